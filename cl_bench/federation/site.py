"""Where clients are: in this process, one model instance for all of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from cl_bench.contracts import Data, FederatedStrategy, State, Task
from cl_bench.experiment.snapshot import copied
from cl_bench.federation.client import Turn, client_fit, client_statistics, client_weights
from cl_bench.federation.partition import ClientTask, Part, Partition
from cl_bench.federation.settings import Federation
from cl_bench.federation.upload import Upload
from cl_bench.learners import BaseLearner


@dataclass(frozen=True)
class Report:
    """What one client sends in one round.

    Attributes:
        client: its number.
        fit: change of weights.
        statistics: about the finished task, where they were asked for along with the change.
    """

    client: int
    fit: Upload
    statistics: Upload | None = None


class Site(Protocol):
    """Runs clients, wherever they are."""

    def begin(self, task: Task, data: Data, partition: Partition) -> None:
        """A task that clients will now be asked about."""

    def fit(
        self, turns: Sequence[Turn], weights: Mapping[str, Tensor], collect: bool
    ) -> Iterator[Report]:
        """Each client's report, in the order of ``turns``.

        Args:
            turns: who learns.
            weights: that they begin with.
            collect: ask for statistics in the client's own model too.
        """

    def statistics(
        self, turns: Sequence[Turn], weights: Mapping[str, Tensor]
    ) -> Iterator[tuple[int, Upload]]:
        """Each client's statistics in the global model, in the order of ``turns``."""

    def take_work(self) -> Mapping[str, int]:
        """Passes since the last call that this process's learner did not count itself."""

    def state_dict(self) -> State:
        """What clients remember, where this process keeps it."""

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""


@dataclass
class InProcess:
    """All clients in this process, one after another.

    Attributes:
        learner: the one model instance.
        strategy: the server's; private states are swapped in and out of it.
        federation: the settings.
        private: state of the strategy by client, where it is private.
    """

    learner: BaseLearner
    strategy: FederatedStrategy
    federation: Federation
    private: dict[int, State] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._untouched = copied(self.strategy.state_dict()) if self.strategy.private else {}
        self._tasks: dict[int, ClientTask] = {}

    def begin(self, task: Task, data: Data, partition: Partition) -> None:
        """Nothing is copied: a client's data are rows of the task's."""
        self._tasks = {k: ClientTask(task, Part(data, r)) for k, r in partition.rows.items()}

    def fit(
        self, turns: Sequence[Turn], weights: Mapping[str, Tensor], collect: bool
    ) -> Iterator[Report]:
        """Each client's report, in the order of ``turns``."""
        by_samples = self.federation.weighting == "samples"
        for turn in turns:
            task = self._tasks[turn.client]
            self._enter(turn.client)
            fitted = client_fit(
                self.learner,
                self.strategy,
                weights,
                task,
                turn,
                self.federation.local_epochs,
                by_samples,
            )
            collected = None
            if collect:
                own = client_weights(self.learner)
                collected = client_statistics(self.learner, self.strategy, own, task, turn)
            self._leave(turn.client)
            yield Report(turn.client, fitted, collected)

    def statistics(
        self, turns: Sequence[Turn], weights: Mapping[str, Tensor]
    ) -> Iterator[tuple[int, Upload]]:
        """Each client's statistics in the global model, in the order of ``turns``."""
        for turn in turns:
            self._enter(turn.client)
            found = client_statistics(
                self.learner, self.strategy, weights, self._tasks[turn.client], turn
            )
            self._leave(turn.client)
            yield turn.client, found

    def _enter(self, client: int) -> None:
        if self.strategy.private:
            self.strategy.load_state_dict(self.private.get(client, self._untouched))

    def _leave(self, client: int) -> None:
        if self.strategy.private:
            self.private[client] = self.strategy.state_dict()
            self.strategy.load_state_dict(self._untouched)

    def take_work(self) -> Mapping[str, int]:
        """None: there is one learner."""
        return {}

    def state_dict(self) -> State:
        """Private states, by client."""
        return {"private": dict(self.private)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.private = dict(state["private"])
