"""A task of a text stream: prompts and answers, tokenized when they are first asked for."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from cl_bench.contracts.language import IGNORE, Codec
from cl_bench.contracts.randomness import generator
from cl_bench.contracts.stream import Batch, Origin, Task
from cl_bench.metrics.answers import metric_named
from cl_bench.metrics.answers.answer import Grade
from cl_bench.tasks.text import tokenising
from cl_bench.tasks.text.prompt import Prompt

Split = Literal["train", "validation", "test"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")

PLACE = 1 << 32
"""An example's number is (3 * task + split) * PLACE + row."""


@dataclass(frozen=True)
class Example:
    """A sample as text.

    Attributes:
        text: what the sample says, without the prompt's frame.
        prompt: all that the model reads.
        answer: what it should say.
    """

    text: str
    prompt: str
    answer: str


class PromptData:
    """Examples as :mod:`cl_bench.contracts.language` lays prompts with answers out.

    Args:
        examples: the samples.
        codec: the tokenizer.
        prompt_length: longer prompts lose their end.
        answer_length: longer answers lose theirs, the end token included.
        first: number of the first example.

    Attributes:
        lengths: size of every prompt, for batches of samples of about one length.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        codec: Codec,
        prompt_length: int,
        answer_length: int,
        first: int,
    ) -> None:
        self.examples = examples
        self.codec = codec
        self.prompt_length = prompt_length
        self.answer_length = answer_length
        self.first = first
        self.lengths = torch.tensor([len(e.prompt) for e in examples], dtype=torch.int64)
        self._tokens: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.examples)

    def _tokenized(self, row: int) -> tuple[Tensor, Tensor]:
        found = self._tokens.get(row)
        if found is None:
            tokens = self._encoded(row) if self._kept is None else self._kept[row]
            prompt = torch.tensor(tokens["prompt"][: self.prompt_length], dtype=torch.int32)
            answer = [*tokens["answer"], self.codec.end][: self.answer_length]
            found = self._tokens[row] = prompt, torch.tensor(answer, dtype=torch.int32)
        return found

    def _encoded(self, row: int) -> Mapping[str, list[int]]:
        example, encode = self.examples[row], self.codec.encode
        return {"prompt": encode(example.prompt, opening=True), "answer": encode(example.answer)}

    @cached_property
    def _kept(self) -> Any:
        """Tokens of all samples, where it pays to keep them; None elsewhere."""
        content = getattr(self.codec, "content", None)
        if content is None or len(self.examples) < tokenising.LEAST:
            return None
        import datasets

        features = {name: [datasets.Value("int32")] for name in ("prompt", "answer")}
        texts = [[example.prompt, example.answer] for example in self.examples]
        return tokenising.tokenised(len(texts), self._encoded, features, [content, texts])

    def __getitem__(self, index: Tensor) -> Batch:
        """The samples at ``index`` (int64, one dimension)."""
        rows = index.tolist()
        prompts = torch.full((len(rows), self.prompt_length), self.codec.pad)
        mask = torch.zeros_like(prompts)
        labels = torch.full((len(rows), self.answer_length), IGNORE)
        for i, row in enumerate(rows):
            prompt, answer = self._tokenized(row)
            prompts[i, : len(prompt)] = prompt
            mask[i, : len(prompt)] = 1
            labels[i, : len(answer)] = answer
        return {
            "input_ids": prompts,
            "attention_mask": mask,
            "labels": labels,
            "example": index + self.first,
        }


class TextTask(Task):
    """A task whose samples are prompts with answers.

    Args:
        name: unique within the stream.
        index: position in the stream.
        splits: examples of ``train``, ``validation`` and ``test``.
        labels: the answers it allows, in the order in which options are listed; empty for free
            text.
        metric: name of the score, or a function of (text, right answer, given answer).
        origin: of the data.
        epochs: how long it is learned; None leaves it to the Trainer.
    """

    head = 0

    def __init__(
        self,
        name: str,
        index: int,
        splits: Mapping[Split, Sequence[Example]],
        labels: Sequence[str],
        metric: str | Grade,
        origin: Origin,
        epochs: int | None = None,
    ) -> None:
        self.name = name
        self.index = index
        self.splits = splits
        self.labels = tuple(labels)
        self.grading = metric
        self.metric = metric_named(metric, "stream.metric")[0]
        self.origin = origin
        self.epochs = epochs
        self.first = index * len(SPLITS) * PLACE

    def tokenize(self, codec: Codec, prompt_length: int, answer_length: int) -> None:
        """To be called once, by the stream."""
        self.codec = codec
        self.prompt_length, self.answer_length = prompt_length, answer_length
        self.classes = range(len(codec.pieces))

    def _data(self, split: Split) -> PromptData:
        return PromptData(
            self.splits[split],
            self.codec,
            self.prompt_length,
            self.answer_length,
            self.first + SPLITS.index(split) * PLACE,
        )

    @cached_property
    def train(self) -> PromptData:
        """Training samples."""
        return self._data("train")

    @cached_property
    def validation(self) -> PromptData:
        """Samples taken out of the training samples."""
        return self._data("validation")

    @cached_property
    def test(self) -> PromptData:
        """Test samples."""
        return self._data("test")

    @cached_property
    def facts(self) -> Mapping[str, Any]:  # type: ignore[override]
        """Sizes and, for closed label sets, what always giving the commonest answer scores."""
        sizes = {f"{split}_samples": len(self.splits[split]) for split in SPLITS}
        if not self.labels:
            return sizes
        counts = Counter(example.answer for example in self.splits["test"])
        majority = max(counts.values(), default=0) / max(1, counts.total())
        return {**sizes, "labels": list(self.labels), "majority": majority}


def carve(
    rows: Sequence[tuple[str, str]], name: str, fraction: float, seed: int
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Training rows without validation rows, and those; each in the file's order."""
    order = torch.randperm(len(rows), generator=generator(seed, "validation", name)).tolist()
    held = set(order[: round(fraction * len(rows))])
    kept = [row for i, row in enumerate(rows) if i not in held]
    return kept, [row for i, row in enumerate(rows) if i in held]


def text_task(
    name: str,
    index: int,
    rows: Mapping[Split, Sequence[tuple[str, str]]],
    category: str,
    labels: Sequence[str],
    prompt: Prompt,
    origin: Origin,
) -> TextTask:
    """A classification task, scored by exact match."""
    splits = {
        split: [Example(text, prompt(text, category, name, labels), label) for text, label in part]
        for split, part in rows.items()
    }
    return TextTask(name, index, splits, labels, "exact_match", origin)
