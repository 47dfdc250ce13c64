"""TRACE (Wang et al., 2023): eight tasks for aligned language models, each with its own metric.

The data is on a cloud drive that its repository (github.com/BeyonderXX/TRACE) links to, and in no
public repository: ``data_dir`` names a copy. Records are ``{prompt, answer}``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.options import Count
from cl_bench.contracts.stream import Origin
from cl_bench.tasks.arguments import require
from cl_bench.tasks.text.codec import BYTES
from cl_bench.tasks.text.stream import TextStream
from cl_bench.tasks.text.task import Example, Split, TextTask

METRICS: Mapping[str, str] = {
    "C-STANCE": "verbatim",
    "FOMC": "verbatim",
    "MeetingBank": "rouge_l",
    "Py150": "edit_similarity",
    "ScienceQA": "first_letter",
    "NumGLUE-cm": "verbatim",
    "NumGLUE-ds": "verbatim",
    "20Minuten": "sari",
}
"""In the order in which they are learned."""

EPOCHS = (5, 3, 7, 5, 3, 5, 5, 7)

ORIGIN = Origin(
    "TRACE, github.com/BeyonderXX/TRACE",
    "see the corpora",
    "Wang et al., TRACE: A Comprehensive Benchmark for Continual Learning in LLMs, 2023",
)

FILES: Mapping[Split, str] = {
    "train": "train.json",
    "validation": "eval.json",
    "test": "test.json",
}


class Trace(TextStream):
    """Stance, finance, meetings, code, science, numbers and simplification, one after another.

    Args:
        data_dir: folder with a folder for every task, in it ``train.json``, ``eval.json`` and
            ``test.json``.
        tasks: names, in order; None for all eight.
        own_epochs: learn each task as long as the paper does; otherwise the Trainer's epochs.
        tokenizer: ``bytes``, a folder or a hub id.
        prompt_length: tokens of the longest prompt; longer ones lose their end.
        answer_length: tokens of the longest answer, its end included.

    Raises:
        UsageError: an argument is out of range, files are missing, or no records.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        tasks: Sequence[str] | None = None,
        own_epochs: bool = True,
        tokenizer: str | None = BYTES,
        prompt_length: Count = 1024,
        answer_length: Count = 512,
    ) -> None:
        names = list(METRICS) if tasks is None else list(tasks)
        unknown = [name for name in names if name not in METRICS]
        require(bool(names) and not unknown, "tasks", names, f"choose from {', '.join(METRICS)}")
        remedy = (
            "TRACE's folder of tasks, each with train.json, eval.json and test.json; the README of "
            "github.com/BeyonderXX/TRACE links to the drive that has it. A generated "
            "stream needs no files: +stream=biography/tiny"
        )
        require(data_dir is not None, "data_dir", data_dir, remedy)
        folder = Path(str(data_dir))
        paths = {(n, split): folder / n / file for n in names for split, file in FILES.items()}
        missing = [str(p.relative_to(folder)) for p in paths.values() if not p.is_file()]
        require(not missing, "data_dir", data_dir, f"missing {', '.join(missing)}; needs {remedy}")
        epochs = dict(zip(METRICS, EPOCHS, strict=True))
        made = [
            TextTask(
                name,
                index,
                {split: _read(paths[name, split]) for split in FILES},
                (),
                METRICS[name],
                ORIGIN,
                epochs[name] if own_epochs else None,
            )
            for index, name in enumerate(names)
        ]
        super().__init__("trace", made, tokenizer, prompt_length, answer_length, False)


def _read(path: Path) -> list[Example]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        prompts = [(str(record["prompt"]), str(record["answer"])) for record in records]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: no list of {{prompt, answer}} records ({type(error).__name__}: {error})"
        ) from error
    return [Example(prompt, prompt, answer) for prompt, answer in prompts]
