"""A stream of text tasks."""

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated

from cl_bench.contracts.language import Codec, PromptStream
from cl_bench.contracts.options import Range
from cl_bench.metrics.answers import metric_named
from cl_bench.metrics.answers.answer import Sees
from cl_bench.tasks.arguments import require
from cl_bench.tasks.text.codec import load_codec
from cl_bench.tasks.text.task import PLACE, SPLITS, Example, TextTask


class TextStream(PromptStream):
    """Prompts with answers, scored by what a model generates.

    Args:
        name: as in the run directory and in tables.
        tasks: in the order in which they are learned.
        tokenizer: ``bytes``, a folder or a hub id (a pretrained model needs its own), or a
            tokenizer.
        prompt_length: tokens of the longest prompt, with what its tokenizer adds; what is longer
            loses its end.
        answer_length: tokens of the longest answer, its end included.
        task_tag: whether prompts name their task.

    Raises:
        UsageError: lengths too small for the labels, or no such tokenizer.
    """

    def __init__(
        self,
        name: str,
        tasks: Sequence[TextTask],
        tokenizer: str | Codec | None,
        prompt_length: Annotated[int, Range(least=8)],
        answer_length: int,
        task_tag: bool,
    ) -> None:
        remedy = "name the pretrained model too, model.name_or_path=..., or use bytes"
        require(tokenizer is not None, "tokenizer", tokenizer, remedy)
        assert tokenizer is not None
        codec = load_codec(tokenizer) if isinstance(tokenizer, str) else tokenizer
        labels = {label for task in tasks for label in task.labels}
        need = max((len(codec.encode(label)) + 1 for label in labels), default=2)
        fits = f"the longest label takes {need} tokens, its end included"
        require(answer_length >= need, "answer_length", answer_length, fits)
        room = prompt_length - len(codec.closing)
        for task in tasks:
            task.tokenize(codec, room, answer_length)
        super().__init__(
            name,
            tasks,
            room,
            answer_length,
            _fingerprint(tasks, [codec.name, prompt_length, answer_length]),
            codec,
            task_tag,
        )
        self._by_number = tuple(tasks)
        self._metrics = [metric_named(task.grading, "stream.metric")[1] for task in tasks]

    @staticmethod
    def _number(example: int) -> int:
        return example // PLACE // len(SPLITS)

    def _find(self, example: int) -> tuple[TextTask, Example]:
        place, row = divmod(example, PLACE)
        task = self._by_number[self._number(example)]
        return task, task.splits[SPLITS[place % len(SPLITS)]][row]

    def answer(self, example: int) -> str:
        """The right answer to an example, as text."""
        return self._find(example)[1].answer

    def grade(self, example: int, answer: str) -> float:
        """Score of an answer in [0, 1], by the metric of the example's task."""
        found = self._find(example)[1]
        grade = self._metrics[self._number(example)].grade
        assert grade is not None  # whatever has none sees no answer
        return grade(found.text, found.answer, answer)

    def sees(self, example: int) -> Sees:
        """What the metric of the example's task scores."""
        return self._metrics[self._number(example)].sees

    def options(self, example: int) -> Sequence[str]:
        """The answers that the example's task allows; empty where they are free text."""
        return self._find(example)[0].labels


def _fingerprint(tasks: Sequence[TextTask], settings: object) -> str:
    digest = hashlib.sha256(json.dumps(settings).encode())
    for task in tasks:
        for split in SPLITS:
            rows = [[e.prompt, e.answer] for e in task.splits[split]]
            digest.update(json.dumps([task.name, split, rows]).encode())
    return digest.hexdigest()
