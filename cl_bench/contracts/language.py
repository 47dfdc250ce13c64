"""Language streams: what a causal language model is given to learn, and how it is scored.

A batch holds, all padded on the right to the stream's common length L:

* ``input_ids`` int64 (n, L): tokens.
* ``labels`` int64 (n, L): the same where a token is to be learned or scored, else :data:`IGNORE`.
  ``labels[i, j]`` is predicted from the tokens before position j.
* ``attention_mask`` int64 (n, L): 1 for tokens, 0 for padding.
* ``kind`` int64 (n,), where a stream asks several kinds of questions: which kind this one is of.
"""

from collections.abc import Sequence

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
