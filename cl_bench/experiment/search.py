"""Choosing hyperparameters fairly: on validation data of the first tasks, with test data sealed.

Chaudhry et al. (ICLR 2019, section 4 of the A-GEM paper) choose on the first three tasks, which the
comparison then leaves out; here they stay in and are flagged.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from cl_bench.contracts import Batch, Data, Stream, Task, UsageError
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, OnlyWith
from cl_bench.metrics.mixed import is_mixed


class SealedError(RuntimeError):
    """Somebody tried to read test data during a search."""


@checked("search.")
@dataclass(frozen=True)
class SearchSettings:
    """Whether a run is a trial of a search.

    Attributes:
        enabled: learn the first tasks alone, and score them on validation data.
        tasks: how many.
    """

    enabled: bool = False
    tasks: Annotated[Count, OnlyWith("enabled", (True,))] = 3


class SearchTask(Task):
    """A task whose test data cannot be read; it is scored on its validation data.

    Args:
        task: the task.

    Raises:
        UsageError: it has no validation data.
    """

    def __init__(self, task: Task) -> None:
        if len(task.validation) == 0:
            raise UsageError(
                f"task {task.name!r} has no validation data to search on: hold some out, for "
                "example stream.validation_fraction=0.1"
            )
        self._task = task
        self.name, self.index, self.classes = task.name, task.index, task.classes
        self.head, self.metric, self.epochs = task.head, task.metric, task.epochs
        self.rate, self.facts, self.origin = task.rate, task.facts, task.origin
        self.ordered, self.kind = task.ordered, task.kind

    @property
    def train(self) -> Data:
        """As of the task."""
        return self._task.train

    @property
    def validation(self) -> Data:
        """As of the task."""
        return self._task.validation

    @property
    def test(self) -> Data:
        """Raises :class:`SealedError`."""
        raise SealedError(
            f"test data of task {self.name!r} cannot be read during a search: choose on "
            "task.validation"
        )

    @property
    def scored(self) -> Data:
        """Validation data in place of test data."""
        return self.validation

    def prepare(self, answer: Callable[[Batch], Tensor]) -> Mapping[str, float] | None:
        """As of the task."""
        return self._task.prepare(answer)

    def sample(self, n: int, seed: int) -> Batch:
        """As of the task."""
        return self._task.sample(n, seed)


def for_search(stream: Stream, settings: SearchSettings) -> Stream:
    """The stream as a search may see it; itself where there is no search.

    Raises:
        UsageError: a task has no validation data, or there are fewer tasks.
    """
    if not settings.enabled:
        return stream
    if settings.tasks > max(len(stream), SearchSettings().tasks):
        raise UsageError(
            f"search.tasks={settings.tasks}: stream {stream.name!r} has {len(stream)} tasks; at "
            "most that many"
        )
    sealed = stream[: settings.tasks]
    metrics = [task.metric for task in sealed]
    if is_mixed(metrics):
        raise UsageError(
            f"search.enabled=true: the tasks' metrics differ ({', '.join(metrics)}), so that there "
            "is no one number to choose by; give all tasks of the search one metric"
        )
    sealed.tasks = tuple(SearchTask(task) for task in sealed.tasks)
    return sealed


def search_facts(stream: Stream, settings: SearchSettings) -> Mapping[str, Any]:
    """What a trial's record says about the search."""
    if not settings.enabled:
        return {}
    return {"search": {"tasks": [task.name for task in stream], "split": "validation"}}
