"""Language streams: what a language model is given to learn, and how it is scored.

A batch of texts (:class:`LanguageStream`) holds, all padded on the right to the common length L:

* ``input_ids`` int64 (n, L): tokens.
* ``labels`` int64 (n, L): the same where a token is to be learned or scored, else :data:`IGNORE`.
  ``labels[i, j]`` is predicted from the tokens before position j.
* ``attention_mask`` int64 (n, L): 1 for tokens, 0 for padding.
* ``kind`` int64 (n,), where a stream asks several kinds of questions: which kind this one is of.

A batch of prompts with answers (:class:`PromptStream`) keeps the two apart, so that it serves
encoder-decoders as well as causal models; prompts are padded to S, answers to K:

* ``input_ids`` int64 (n, S): the prompt's tokens, with what its tokenizer puts before a text, but
  not what it puts behind one.
* ``attention_mask`` int64 (n, S): 1 for tokens, 0 for padding.
* ``labels`` int64 (n, K): the answer's tokens and the end token, then :data:`IGNORE`.
* ``example`` int64 (n,): number of the sample, for :meth:`PromptStream.grade`.
* ``earlier`` int64 (n, S), in training data where a stream :attr:`~PromptStream.teaches_prompts`:
  the prompt's tokens where those are learned too, else :data:`IGNORE`.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal, Protocol

from torch import Tensor

from cl_bench.contracts.stream import Stream, Task

IGNORE = -100
"""Label of a position that is neither learned nor scored; what PyTorch's cross-entropy ignores."""


class LanguageStream(Stream):
    """Tasks made of token sequences; the label space is the vocabulary, one head serves all.

    Args:
        name: as in the run directory and in tables.
        tasks: in the order in which they are learned.
        length: L.
        fingerprint: content hash of the data under the stream.
        vocabulary: text of every token; joined, they are the text of a sequence.
        end: token that ends a document or an answer.
        pad: token of padding.
        kinds: names of the kinds of questions, by ``kind``; may be empty.
        openings: bool (kinds, vocabulary), which tokens an answer of each kind can begin with.
    """

    def __init__(
        self,
        name: str,
        tasks: Sequence[Task],
        length: int,
        fingerprint: str,
        *,
        vocabulary: Sequence[str],
        end: int,
        pad: int,
        kinds: Sequence[str] = (),
        openings: Tensor | None = None,
    ) -> None:
        super().__init__(name, tasks, "domain", (length,), fingerprint, modality="text")
        self.vocabulary = tuple(vocabulary)
        self.end = end
        self.pad = pad
        self.kinds = tuple(kinds)
        self.openings = openings

    def text(self, tokens: Tensor) -> str:
        """What a sequence of tokens (L,) says; padding is left out."""
        return "".join(self.vocabulary[token] for token in tokens.tolist() if token != self.pad)


class Codec(Protocol):
    """A tokenizer, as far as streams and learners use it.

    Attributes:
        name: what the configuration calls it; part of the data's fingerprint.
        pieces: text of every token.
        end: token that ends an answer.
        pad: token of padding; may be the same, as masks say what counts.
        closing: tokens that stand behind a text which an encoder reads.
    """

    name: str
    pieces: Sequence[str]
    end: int
    pad: int
    closing: Sequence[int]

    def encode(self, text: str, opening: bool = False) -> list[int]:
        """Tokens of a text; with ``opening`` after what stands before a prompt."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, up to the first end token and without special ones."""


class PromptStream(LanguageStream):
    """Tasks made of prompts with answers, tokenized for one model.

    Args:
        name: as in the run directory and in tables.
        tasks: in the order in which they are learned.
        prompt_length: S, without what an encoder wants behind the prompt.
        answer_length: K, the end token included; no longer answer is generated.
        fingerprint: content hash of the data under the stream.
        codec: the tokenizer.
        task_id_at_test: whether prompts name their task.

    Attributes:
        teaches_prompts: whether training data also labels parts of prompts: earlier answers of a
            conversation. That takes a causal model.
    """

    teaches_prompts: bool = False

    def __init__(
        self,
        name: str,
        tasks: Sequence[Task],
        prompt_length: int,
        answer_length: int,
        fingerprint: str,
        codec: Codec,
        task_id_at_test: bool,
    ) -> None:
        super().__init__(
            name,
            tasks,
            prompt_length,
            fingerprint,
            vocabulary=codec.pieces,
            end=codec.end,
            pad=codec.pad,
        )
        self.prompt_length = prompt_length
        self.answer_length = answer_length
        self.codec = codec
        self.task_id_at_test = task_id_at_test

    def text(self, tokens: Tensor) -> str:
        """What tokens (L,) say, up to the end token."""
        return self.codec.decode([t for t in tokens.tolist() if t != IGNORE])

    @abstractmethod
    def answer(self, example: int) -> str:
        """The right answer to an example, as text."""

    @abstractmethod
    def grade(self, example: int, answer: str) -> float:
        """Score of an answer in [0, 1], by the metric of the example's task."""

    @abstractmethod
    def options(self, example: int) -> Sequence[str]:
        """The answers that the example's task allows; empty where they are free text."""

    def sees(self, example: int) -> Literal["answer", "choice", "loss"]:
        """What the metric of the example's task scores.

        A generated answer, by :meth:`grade`; which of :meth:`options` is the likeliest; or how
        likely the right answer is.
        """
        return "answer"

    def limit(self, example: int) -> int:
        """Tokens of the longest answer to an example that is generated, its end included."""
        return self.answer_length

    def answer_tokens(self, example: int, answer: str) -> list[int]:
        """What a model writes to give an answer, its end included."""
        return [*self.codec.encode(answer), self.end]
