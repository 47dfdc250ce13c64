"""Unlearning by relabelling: what is to be forgotten is learned with wrong answers."""

from cl_bench.contracts import Batch, Learner, Needs, State, Strategy, Task, generator
from cl_bench.strategies.unlearning.relabelled import relabelled


class Relabel(Strategy):
    """Learns tasks as they come; requests with the answers of others, drawn anew every time."""

    needs = Needs(forgets=True)

    def __init__(self) -> None:
        self.drawn = 0
        self._classes: range | None = None

    def setup(self, learner: Learner, task: Task) -> None:
        """Which kind of task it is."""
        self._classes = task.classes if task.kind == "forget" else None

    def on_batch(self, learner: Learner, batch: Batch) -> Batch:
        """The batch, relabelled where it is a request's."""
        if self._classes is None:
            return batch
        self.drawn += 1
        return relabelled(batch, self._classes, generator(learner.seed, "relabel", self.drawn))

    def state_dict(self) -> State:
        """How many batches were relabelled."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.drawn = state["drawn"]
