"""What a strategy adds to learn from clients that share no data."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor

from cl_bench.contracts.learner import Learner
from cl_bench.contracts.strategy import State, Strategy


class FederatedStrategy(Strategy):
    """Base class of update rules that clients and a server can follow together.

    Clients call the hooks of a task on their own data, once a round; the server takes the sum of
    what they collected into memory. ``needs.engines`` holds ``federated``.
    """

    private: ClassVar[bool] = False
    """Whether the state belongs to each client and never leaves it."""

    collects_on: Literal["global", "local"] = "global"
    """The weights that :meth:`collect` sees: those that the server holds after the task, or each
    client's own from the task's last round."""

    def server_update(self, learner: Learner, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The change (by parameter name) that the server makes to the weights.

        Args:
            learner: holds the global weights.
            update: the mean of the clients' changes, after the server's optimizer.
        """
        return dict(update)

    def share(self, purpose: Literal["fit", "collect"]) -> State:
        """What of the server's memory clients are sent, as a state."""
        return {} if self.private else self.state_dict()
