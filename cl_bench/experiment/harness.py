"""lm-evaluation-harness on a model at hand: how well it does what no task teaches.

Gao et al., "The Language Model Evaluation Harness" (package ``lm-eval``). Any of its tasks can be
named, and those of a folder in its own format; three tiny ones come with the package, so that the
path runs without a network. They show damage to a pretrained model, and are no benchmark.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_bench.contracts import UsageError
from cl_bench.contracts.options import known

BUNDLED = Path(__file__).parent / "general_tasks"

TINY = ("cl_bench_facts", "cl_bench_words", "cl_bench_follow")


@dataclass(frozen=True)
class Harness:
    """What is asked of a model.

    Args:
        tasks: names.
        folder: with further tasks in the harness' own format.
        limit: most questions of a task; None for all.
        num_fewshot: examples before a question; None leaves it to the task.
        chat: whether questions are written as turns of a chat.
        batch_size: questions of a batch.
        prefix: what stands before an option in messages: ``probe.general.``.

    Raises:
        UsageError: the package is missing, or there is no such task or folder.
    """

    tasks: Sequence[str]
    folder: str | None
    limit: int | None
    num_fewshot: int | None
    chat: bool
    batch_size: int
    prefix: str

    def check(self) -> None:
        """Before any work: everything that was named is there."""
        if not self.tasks:
            raise UsageError(f"{self.prefix}tasks=[]: name a task, such as {TINY[0]}")
        if self.folder is not None and not Path(self.folder).is_dir():
            raise UsageError(f"{self.prefix}folder={self.folder}: no such folder")
        there = self._manager().all_tasks
        for task in self.tasks:
            if task not in there:
                raise UsageError(
                    f"{self.prefix}tasks={task}: the harness has no such task."
                    f"{known(task, there)} Those of the package are {', '.join(TINY)}"
                )

    def _manager(self) -> Any:
        try:
            import lm_eval.tasks  # noqa: F401
        except ImportError as error:
            raise UsageError(
                f"{self.prefix}tasks: needs a package that is not installed ({error}): "
                "pip install 'cl_bench[general]'"
            ) from None
        own = all(task.startswith("cl_bench_") for task in self.tasks)
        return _manager(self.folder, not own)

    def score(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """Score of every task, each by the first metric that it names.

        Args:
            model: of transformers, on the device where it computes.
            tokenizer: its own.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        before = logging.getLogger("lm_eval").level
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        try:
            pairs = bool(model.config.is_encoder_decoder)
            asked = HFLM(
                pretrained=model,
                tokenizer=tokenizer,
                backend="seq2seq" if pairs else "causal",
                batch_size=self.batch_size,
            )
            found: Any = simple_evaluate(
                asked,
                tasks=list(self.tasks),
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                apply_chat_template=self.chat,
                task_manager=self._manager(),
                bootstrap_iters=0,
                log_samples=False,
            )
        finally:
            logging.getLogger("lm_eval").setLevel(before)
        return {task: _first(found, task) for task in self.tasks}


@functools.cache
def _manager(folder: str | None, theirs: bool) -> Any:
    """What knows the tasks there are; reading the harness' own thousands takes seconds."""
    from lm_eval.tasks import TaskManager

    folders = [str(BUNDLED), *([folder] if folder else [])]
    return TaskManager(include_path=folders, include_defaults=theirs)


def _first(found: Mapping[str, Any], task: str) -> float:
    """The score by the first metric of a task; of a group, by the first that it sums up."""
    values = {**found["results"].get(task, {}), **(found.get("groups") or {}).get(task, {})}
    numbers = {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and "," in key and "stderr" not in key
    }
    config = (found.get("configs") or {}).get(task) or {}
    named = [str(m["metric"]) for m in config.get("metric_list") or () if "metric" in m]
    for name in named:
        for key, value in numbers.items():
            if key.partition(",")[0] == name:
                return value
    if not numbers:
        raise UsageError(f"{task}: the harness gives no score of it; name another task")
    return next(iter(numbers.values()))
