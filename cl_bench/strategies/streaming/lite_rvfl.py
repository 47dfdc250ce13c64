"""Lite-RVFL (repository Lite-RVFL @ 6875c1c): random features, least squares that forgets.

z = [x, sigmoid(x W_1 + b_1), ..., sigmoid(x W_g + b_g)] with random W_i of orthogonal columns, and
beta minimises sum_t theta^(2t) |y_t - z_t beta|^2 + rho |beta|^2. The authors' recursion multiplies
by theta^(2t), which leaves double precision after 118,474 samples at theta = 1.003; this is the
same beta by recursive least squares with lambda = theta^-2. Theirs draws one bias a group; ours is
one a node. Their ridge decays as lambda^t: ``regularisation: decaying``.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from cl_bench.contracts import generator
from cl_bench.contracts.options import Count, Range, Rate
from cl_bench.strategies.streaming.observer import StreamLearner
from cl_bench.subspace import RecursiveLeastSquares


class LiteRVFL(StreamLearner):
    """Random features and a readout by recursive least squares with forgetting.

    Args:
        groups: g, of random nodes.
        nodes: of a group.
        theta: each sample weighs theta^2 times the one before; 1 forgets nothing.
        ridge: rho.
        regularisation: ``constant`` keeps the ridge while samples are forgotten, ``decaying``
            forgets it too, as published.
    """

    def __init__(
        self,
        groups: Count = 10,
        nodes: Count = 10,
        theta: Annotated[float, Range(least=1)] = 1.003,
        ridge: Rate = 0.1,
        regularisation: Literal["constant", "decaying"] = "constant",
    ) -> None:
        super().__init__()
        self.groups, self.nodes = groups, nodes
        self.theta, self.ridge, self.regularisation = theta, ridge, regularisation
        self.weights = self.biases = torch.zeros(0)
        self.readout: RecursiveLeastSquares | None = None

    def grow(self, classes: int) -> None:
        """Their targets were 0 so far."""
        if self.readout is not None:
            self.readout.widen(classes)

    def begin(self, x: Tensor, seed: int) -> None:
        """Draw W (d, g nodes) and b, (g nodes,)."""
        rng = generator(seed, "random features")
        d, nodes = x.shape[1], self.nodes
        drawn = [2 * torch.rand(d, nodes, generator=rng).double() - 1 for _ in range(self.groups)]
        self.weights = torch.cat([_orthogonal(W) for W in drawn], 1)
        self.biases = 2 * torch.rand(self.groups * nodes, generator=rng).double() - 1
        self.readout = self._solver(d + self.groups * nodes, self.classes)

    def _solver(self, width: int, classes: int) -> RecursiveLeastSquares:
        constant = self.regularisation == "constant"
        return RecursiveLeastSquares(width, classes, self.ridge, self.theta**-2, constant)

    def _features(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.sigmoid(x @ self.weights + self.biases)], 1)

    def learn(self, x: Tensor, y: Tensor) -> None:
        """One step of the recursion for all rows."""
        assert self.readout is not None
        self.readout.learn(self._features(x), y)

    def answers(self, x: Tensor) -> Tensor:
        """Of the readout: z beta."""
        assert self.readout is not None
        return self._features(x) @ self.readout.beta

    def memory(self) -> Mapping[str, Any]:
        """Random features and the readout."""
        assert self.readout is not None
        own = {"weights": self.weights, "biases": self.biases}
        return {**own, "readout": self.readout.state_dict()}

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Inverse of :meth:`memory`."""
        self.weights, self.biases = memory["weights"], memory["biases"]
        width, classes = memory["readout"]["beta"].shape
        self.readout = self._solver(width, classes)
        self.readout.load_state_dict(memory["readout"])


def _orthogonal(W: Tensor) -> Tensor:
    """Columns of W (d, n) made orthonormal, d at a time where there are more."""
    return torch.cat([torch.linalg.qr(part)[0] for part in torch.split(W, len(W), 1)], 1)
