"""Where the rounds of a task stand, and their part of a checkpoint."""

from torch import Tensor

from cl_bench.contracts import State
from cl_bench.federation.history import Traffic
from cl_bench.federation.reducer import Reducer
from cl_bench.federation.server import ServerOptimizerState


class Rounds:
    """Of one task.

    Attributes:
        weights: that the server holds.
        server: its optimizer.
        statistics: of clients that gave them along with their last fit.
        steps: that clients took.
        traffic: of the task.
    """

    def __init__(
        self, weights: dict[str, Tensor], server: ServerOptimizerState, statistics: Reducer
    ) -> None:
        self.weights = weights
        self.server = server
        self.statistics = statistics
        self.steps = 0
        self.traffic = Traffic()

    def state_dict(self, round: int) -> State:
        """For a checkpoint before a round; the weights are in it already."""
        optimizer = self.server.optimizer
        return {
            "round": round,
            "steps": self.steps,
            "traffic": vars(self.traffic),
            "server": optimizer.state_dict() if optimizer else {},
        }

    def resume(self, state: State) -> int:
        """Inverse of :meth:`state_dict`; the round to go on with."""
        self.steps = state["steps"]
        self.traffic = Traffic(**state["traffic"])
        if self.server.optimizer is not None:
            self.server.optimizer.load_state_dict(state["server"])
        return int(state["round"])
