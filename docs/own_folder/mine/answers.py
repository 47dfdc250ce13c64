"""Your own prompts with answers: a folder a task, one JSON object a line."""

import json
from collections.abc import Sequence
from pathlib import Path

from cl_bench.contracts import Origin, UsageError
from cl_bench.tasks.text import Example, TextStream, TextTask

SPLITS = ("train", "validation", "test")


class Answers(TextStream):
    """Tasks of ``{"prompt": ..., "answer": ...}``, scored by the answers a model generates.

    Args:
        data_dir: a folder a task, in it ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``.
        tasks: names of the folders, in the order in which they are learned.
        metric: ``exact_match``, ``verbatim``, ``rouge_l`` or ``edit_similarity``.
        tokenizer: ``bytes``, a folder or a hub id.
        prompt_length: tokens of the longest prompt; longer ones lose their end.
        answer_length: tokens of the longest answer, its end included.
    """

    def __init__(
        self,
        data_dir: str,
        tasks: Sequence[str],
        metric: str = "exact_match",
        tokenizer: str = "bytes",
        prompt_length: int = 256,
        answer_length: int = 32,
    ) -> None:
        origin = Origin(source=data_dir, licence="your own", citation="none")
        made = []
        for index, name in enumerate(tasks):
            splits = {split: _read(Path(data_dir) / name / f"{split}.jsonl") for split in SPLITS}
            made.append(TextTask(name, index, splits, (), metric, origin))
        super().__init__("answers", made, tokenizer, prompt_length, answer_length, task_tag=False)


def _read(path: Path) -> list[Example]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [Example(row["prompt"], row["prompt"], row["answer"]) for row in rows]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f'{path}: needs lines of {{"prompt", "answer"}} ({error!r})') from error
