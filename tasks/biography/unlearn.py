"""The biography stream with requests to forget: people whom a model should no longer know.

Who is forgotten is known exactly, and so is who is not: other people, drawn in the same way. What a
request does can so be told from what it does to their neighbours, and a second half of the people
of a request tells whether relearning the first brings it back: unlearned, or hidden.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any

from cl_bench.contracts.options import Count, Inherited, Range
from cl_bench.contracts.stream import Data, Recovery, Task
from cl_bench.data import MemoryData
from cl_bench.tasks.arguments import require
from cl_bench.tasks.biography.stream import ORIGIN, Biography, BiographyTask, _hash, _numbers
from cl_bench.tasks.biography.world import World


class ForgetRequest(Task):
    """Some people whom the model was taught to answer about.

    Args:
        world: the people.
        index: position in the stream.
        number: of the request, from 1.
        people: who is to be forgotten.
        strangers: people whom no text mentions, the control.
        epochs: how long it is trained on.
        rate: multiplies the optimizer's learning rate.
    """

    metric = "exact_match"
    kind = "forget"
    head = 0
    origin = ORIGIN

    def __init__(
        self,
        world: World,
        index: int,
        number: int,
        people: range,
        strangers: range,
        epochs: int,
        rate: float,
    ) -> None:
        self.world, self.index, self.people = world, index, people
        self.name = f"forget_{number}"
        self.strangers, self.epochs, self.rate = strangers, epochs, rate
        self.classes = range(len(world.vocabulary))
        self.facts = {"people_forgotten": [people.start, people.stop]}

    def _questions(self, people: range) -> MemoryData:
        return self.world.questions_about(_numbers(people), self.world.length)

    @cached_property
    def train(self) -> MemoryData:
        """Questions and answers about them."""
        return self._questions(self.people)

    @property
    def test(self) -> MemoryData:
        """The same."""
        return self.train

    @cached_property
    def validation(self) -> Data:
        """Empty."""
        return self._questions(range(0))

    @cached_property
    def probes(self) -> Mapping[str, Data]:
        """``biography``: what is asked, in the form in which it was read."""
        return {"biography": self.world.statements_about(_numbers(self.people), self.world.length)}

    @cached_property
    def recovery(self) -> Recovery:  # type: ignore[override]
        """First and second half of the people."""
        middle = self.people.start + len(self.people) // 2
        return Recovery(
            self._questions(range(self.people.start, middle)),
            self._questions(range(middle, self.people.stop)),
            self._questions(self.strangers) if self.strangers else None,
            self.world.chance,
        )


class _Read(BiographyTask):
    """Task 0, with people beside those of requests as a probe.

    Attributes:
        neighbours: taught like those who are forgotten, and in no request.
    """

    neighbours = range(0)

    @cached_property
    def probes(self) -> Mapping[str, Data]:
        """``neighbours``, beside those of the task."""
        return {**super().probes, "neighbours": self._questions(self.neighbours)}


class UnlearnBiography(Biography):
    """People read about and asked about, then requests to forget some of them.

    Args:
        requests: how many.
        forgotten: people of each, of those that task 0 teaches.
        neighbours: people whom task 0 teaches and no request names, asked about in between.
        forget_epochs: over a request's questions.
        forget_rate: multiplies the optimizer's learning rate there.
        task_id_at_test: whether the task id is known at test time, as an oracle's gate needs it.
        shared: as in :class:`Biography`, whose ``num_tasks`` is 0 here.

    Raises:
        UsageError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        requests: Count = 3,
        forgotten: Annotated[int, Range(least=2)] = 20,
        neighbours: Count = 50,
        forget_epochs: Count = 10,
        forget_rate: Annotated[float, Range(above=0)] = 0.1,
        task_id_at_test: bool | None = None,
        **shared: Inherited,
    ) -> None:
        super().__init__(**{"num_tasks": 0, **shared})
        (read,) = self.tasks if len(self.tasks) == 1 else (None,)
        require(read is not None, "num_tasks", shared.get("num_tasks"), "must be 0")
        assert isinstance(read, BiographyTask)
        needed = requests * forgotten + neighbours
        require(
            needed <= len(read.learned),
            "forgotten",
            forgotten,
            f"{requests} requests and {neighbours} neighbours need {needed} people, and task 0 "
            f"teaches {len(read.learned)}",
        )
        read.__class__ = _Read
        first = requests * forgotten
        read.neighbours = range(first, first + neighbours)  # type: ignore[attr-defined]
        asked: list[Task] = [
            ForgetRequest(
                self.world,
                1 + k,
                1 + k,
                range(k * forgotten, (k + 1) * forgotten),
                read.strangers,
                forget_epochs,
                forget_rate,
            )
            for k in range(requests)
        ]
        self.tasks = (read, *asked)
        self.name = "biography_unlearn"
        own: list[Any] = [self.fingerprint, requests, forgotten, neighbours]
        self.fingerprint = _hash(own)
        self.task_id_at_test = bool(task_id_at_test)
