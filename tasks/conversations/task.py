"""A task of conversations: samples in tokens, cut where they must be, counted where they were."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.language import IGNORE
from cl_bench.contracts.stream import Batch, Origin
from cl_bench.metrics.answers.answer import Grade
from cl_bench.tasks.conversations.forms import Conversation
from cl_bench.tasks.conversations.rendering import ChatCodec, Rendered, Turns
from cl_bench.tasks.text.task import Example, PromptData, Split, TextTask


@dataclass(frozen=True)
class ChatExample(Example):
    """A sample as text and as tokens.

    Attributes:
        tokens: of prompt and answer, cut to the longest that is read.
        choices: the answers that are allowed.
    """

    tokens: Rendered
    choices: Sequence[str] = ()


class ChatData(PromptData):
    """Samples whose tokens are known.

    Args:
        earlier: whether batches say which tokens of prompts are learned.
        like: all else.
    """

    examples: Sequence[ChatExample]

    def __init__(self, earlier: bool, *like: Any) -> None:
        super().__init__(*like)
        self._earlier = earlier
        sizes = [len(e.tokens.prompt) for e in self.examples]
        self.lengths = torch.tensor(sizes, dtype=torch.int64)

    def _tokenized(self, row: int) -> tuple[Tensor, Tensor]:
        tokens = self.examples[row].tokens
        prompt = torch.tensor(tokens.prompt, dtype=torch.int32)
        return prompt, torch.tensor(tokens.answer, dtype=torch.int32)

    def __getitem__(self, index: Tensor) -> Batch:
        """The samples at ``index`` (int64, one dimension)."""
        batch = super().__getitem__(index)
        if self._earlier:
            told = torch.full_like(batch["input_ids"], IGNORE)
            for i, row in enumerate(index.tolist()):
                learned = torch.tensor(self.examples[row].tokens.earlier, dtype=torch.bool)
                places = learned.nonzero().squeeze(1)
                told[i, places] = batch["input_ids"][i, places]
            batch["earlier"] = told
        return batch


class ChatTask(TextTask):
    """A task of conversations.

    Args:
        name: unique within the stream.
        index: position in the stream.
        splits: samples of ``train``, ``validation`` and ``test``.
        choices: the answers that all samples allow; those of a sample's own come first.
        metric: name of the score, or a function.
        origin: of the data.
        epochs: how long it is learned; None leaves it to the Trainer.
        told: for the record: how many samples there are, and how many of them were cut.

    Attributes:
        earlier: whether training batches say which tokens of prompts are learned.
        longest: tokens of the longest answer, or allowed answer.
    """

    splits: Mapping[Split, Sequence[ChatExample]]

    def __init__(
        self,
        name: str,
        index: int,
        splits: Mapping[Split, Sequence[ChatExample]],
        choices: Sequence[str],
        metric: str | Grade,
        origin: Origin,
        epochs: int | None,
        told: Mapping[str, Any],
    ) -> None:
        super().__init__(name, index, splits, choices, metric, origin, epochs)
        self.told = told
        self.earlier = False
        answers = [e.tokens.answer for part in splits.values() for e in part]
        self.longest = max(map(len, answers))

    def _data(self, split: Split) -> ChatData:
        return ChatData(
            self.earlier and split == "train",
            self.splits[split],
            self.codec,
            self.prompt_length,
            self.answer_length,
            super()._data(split).first,
        )

    @cached_property
    def facts(self) -> Mapping[str, Any]:  # type: ignore[override]
        """Sizes, what was cut and, for closed label sets, what the commonest answer scores."""
        return {**TextTask.facts.func(self), **self.told}  # type: ignore[attr-defined]


class Cutter:
    """Makes samples of conversations, none of them too long.

    Args:
        codec: writes them.
        turns: which answers of a conversation are learned.
        longest: tokens of a sample.
        key: says so, in messages: ``stream.max_length``.

    Attributes:
        cut: samples whose prompt lost its beginning so far.
    """

    def __init__(self, codec: ChatCodec, turns: Turns, longest: int, key: str) -> None:
        self.codec, self.turns, self.longest, self.key = codec, turns, longest, key
        self.cut = 0

    def __call__(self, rows: Sequence[Conversation], learned: bool) -> list[ChatExample]:
        """The samples of conversations; of those that are scored, their last answers alone.

        Raises:
            UsageError: an answer alone is too long.
        """
        found = self.codec.render_all(rows, self.turns if learned else "last")
        return [
            ChatExample(row.asked, one.text, row.answer, self._fitted(one, row.place), row.choices)
            for row, samples in zip(rows, found, strict=True)
            for one in samples
        ]

    def _fitted(self, one: Rendered, place: str) -> Rendered:
        opening = self.codec.opening(one.prompt)
        room = self.longest - len(self.codec.closing) - len(one.answer)
        if room <= opening:
            raise UsageError(
                f"{place}: its answer takes {len(one.answer)} tokens, and {self.key}={self.longest}"
                " leaves no place for a prompt; raise it, or take the row out"
            )
        if len(one.prompt) <= room:
            return one
        self.cut += 1
        start = len(one.prompt) - (room - opening)
        prompt = [*one.prompt[:opening], *one.prompt[start:]]
        earlier = [*one.earlier[:opening], *one.earlier[start:]]
        return Rendered(one.text, prompt, earlier, one.lead, one.answer)
