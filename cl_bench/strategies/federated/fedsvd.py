"""FedSVD (repository fed-svd @ 36650e2): clients train B, the server turns A with what was learned.

After a round the mean B and the A that all clients had are put as B A = U S V^T into

    A <- V_r^T,  B <- U_r S_r,

which keeps the product and has A A^T = I. Thin: QR of B and of A^T, and the SVD of an r x r core.
Clients need no noise on A, which only the server changes, by what it was sent; a client's optimizer
does not outlive a round. Until B is other than zero there is nothing to turn.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from cl_bench.contracts import Learner, State
from cl_bench.contracts.options import Count, Inherited
from cl_bench.strategies.federated.fed_lora import FedLoRA


class FedSVD(FedLoRA):
    """Federated averaging of B, whose A is turned to the product's right singular vectors.

    Args:
        every: rounds after which A is turned; None never does, which is ``ffa_lora``.
        shared: as in :class:`FedLoRA`.
    """

    fixed_down: ClassVar[bool] = True

    def __init__(self, *, every: Count | None = 1, **shared: Inherited) -> None:
        super().__init__(**shared)
        self.every = every
        self.rounds = 0

    def server_update(self, learner: Learner, update: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean change of B and heads, and then the turn of A and B."""
        found = dict(update)
        self.rounds += 1
        if self.every is None or self.rounds % self.every:
            return found
        names = {id(p): name for name, p in learner.network.named_parameters()}
        for layer in self.shapes:
            A, B = (part.weight for part in self.pair(learner, layer))
            name_A, name_B = names[id(A)], names[id(B)]
            before = B.detach().double()
            moved = before + update[name_B].double() if name_B in update else before
            if not bool(moved.any()):
                continue
            turned_A, turned_B = turn(A.detach().double(), moved)
            found[name_A] = (turned_A - A.detach().double()).to(A)
            found[name_B] = (turned_B - before).to(B)
        return found

    def state_dict(self) -> State:
        """The family's, and how many rounds there were."""
        return {**super().state_dict(), "rounds": self.rounds}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.rounds = state["rounds"]


def turn(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """V_r^T (r, d) and U_r S_r (o, r) of B A = U S V^T."""
    Q, R = torch.linalg.qr(B)
    P, T = torch.linalg.qr(A.t())
    U, S, Vt = torch.linalg.svd(R @ T.t())
    return Vt @ P.t(), Q @ (U * S)
