"""What the stream costs in general: tasks of lm-evaluation-harness before and after every task."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from cl_bench.contracts import Stream, Task, UsageError
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, Index
from cl_bench.experiment.harness import TINY, Harness
from cl_bench.experiment.observer import Observer
from cl_bench.experiment.probes.settings import ENABLED, Probe, Scene
from cl_bench.learners import BaseLearner
from cl_bench.parallel.ranks import world
from cl_bench.tracking import Record


@checked("probe.general.")
@dataclass(frozen=True)
class GeneralSettings(Probe):
    """Scores on tasks that the stream does not teach, as a second matrix.

    Attributes:
        enabled: measure it.
        tasks: names of lm-evaluation-harness; the default ones come with the package.
        folder: with further tasks in the harness' format.
        limit: most questions of a task.
        num_fewshot: examples before each; None leaves it to the task.
        chat: write questions as turns of a chat.
    """

    enabled: bool = False
    tasks: Annotated[Sequence[str], ENABLED] = TINY
    folder: Annotated[str | None, ENABLED] = None
    limit: Annotated[Count | None, ENABLED] = 100
    num_fewshot: Annotated[Index | None, ENABLED] = None
    chat: Annotated[bool, ENABLED] = False

    def observer(self, scene: Scene) -> Observer:
        """What watches."""
        harness = Harness(
            tuple(self.tasks),
            self.folder,
            self.limit,
            self.num_fewshot,
            self.chat,
            scene.eval_batch_size,
            "probe.general.",
        )
        return General(harness, scene.stream, scene.record)


class General(Observer):
    """Row 0 before the first task, row t after t tasks; each is an event of the record.

    Args:
        harness: what is asked.
        stream: tells the tokenizer.
        record: keeps what was found.

    Raises:
        UsageError: the harness is missing or has no such task, the stream has no tokenizer of
            transformers, or several processes share the model.
    """

    def __init__(self, harness: Harness, stream: Stream, record: Record) -> None:
        codec: Any = getattr(stream, "codec", None)
        self.tokenizer: Any = getattr(codec, "tokenizer", None)
        if self.tokenizer is None:
            raise UsageError(
                f"probe.general.enabled=true: stream {stream.name!r} has no tokenizer that reads "
                "any text; use +stream=chat or another stream of prompts, or leave it off"
            )
        if world() > 1:
            raise UsageError(
                "probe.general.enabled=true: the harness asks one process; leave it off, and ask "
                "afterwards: python -m cl_bench general=<run>"
            )
        harness.check()
        self.harness = harness
        self.record = record

    def before_task(self, learner: BaseLearner, task: Task) -> None:
        """Measure, before the first."""
        if task.index == 0:
            self._measure(learner, task, 0)

    def after_task(self, learner: BaseLearner, task: Task) -> Mapping[str, Mapping[str, float]]:
        """Measure."""
        self._measure(learner, task, task.index + 1)
        return {}

    def _measure(self, learner: BaseLearner, task: Task, row: int) -> None:
        began = time.perf_counter()
        with learner.evaluating():
            values = self.harness.score(learner.model, self.tokenizer)
        seconds = time.perf_counter() - began
        self.record.general(task.index, row, values, seconds, self.harness.limit)
