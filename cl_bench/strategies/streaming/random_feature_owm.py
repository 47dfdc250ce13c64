"""Random features under a readout that keeps old answers: in the spirit of IF2Net, no more.

Of IF2Net (Li et al., arXiv 2306.10480) only the abstract could be read: random weights that all
tasks share, drifted representations brought back without touching those weights, output weights
that change in an orthogonal space, no task id at test. Its method section, code and tables could
not be found, so this is a reconstruction of the part that the abstract names: frozen random
features z = relu(x W + b) / sqrt(m) and a readout whose steps are projected as orthogonal weight
modification does (Zeng et al., Nature Machine Intelligence 2019),

    beta <- beta + eta P z^T (y - z beta) / n,  P = alpha (alpha I + sum of z^T z of old tasks)^-1,

or, with ``readout: ridge``, solved on everything seen. The representation's part is left out.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from cl_bench.contracts import Learner, Statistics, Task, generator
from cl_bench.contracts.options import Count, Rate
from cl_bench.strategies.streaming.observer import StreamLearner
from cl_bench.subspace import RecursiveLeastSquares


class RandomFeatureOWM(StreamLearner):
    """Frozen random features, a readout that moves where old inputs do not reach.

    Args:
        nodes: random features.
        readout: ``owm`` projects steps by the features of the tasks before, ``ridge`` solves
            least squares on all samples.
        alpha: of P; small keeps old answers, and is the ridge of ``ridge``.
        rate: eta.
    """

    def __init__(
        self,
        nodes: Count = 200,
        readout: Literal["owm", "ridge"] = "owm",
        alpha: Rate = 0.01,
        rate: Rate = 0.5,
    ) -> None:
        super().__init__()
        self.nodes, self.readout, self.alpha, self.rate = nodes, readout, alpha, rate
        self.weights = self.biases = self.P = self.gram = torch.zeros(0)
        self.solver = RecursiveLeastSquares(1, 1, alpha)

    def grow(self, classes: int) -> None:
        """Their targets were 0 so far."""
        self.solver.widen(classes)

    def begin(self, x: Tensor, seed: int) -> None:
        """Draw W (d, nodes) and b (nodes,)."""
        rng = generator(seed, "random features")
        scale = x.shape[1] ** -0.5
        self.weights = scale * torch.randn(x.shape[1], self.nodes, generator=rng).double()
        self.biases = torch.randn(self.nodes, generator=rng).double()
        self.P = torch.eye(self.nodes).double()
        self.gram = torch.zeros(self.nodes, self.nodes).double()
        self.solver = RecursiveLeastSquares(self.nodes, self.classes, self.alpha)

    def _features(self, x: Tensor) -> Tensor:
        z: Tensor = torch.relu(x @ self.weights + self.biases) / self.nodes**0.5
        return z

    def learn(self, x: Tensor, y: Tensor) -> None:
        """One step, or the solution."""
        z = self._features(x)
        if self.readout == "ridge":
            self.solver.learn(z, y)
            return
        step = z.t() @ (y - z @ self.solver.beta)
        self.solver.beta = self.solver.beta + self.rate / len(z) * (self.P @ step)
        self.gram += z.t() @ z

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """P of all tasks so far."""
        if self.readout == "owm" and len(self.gram):
            eye = torch.eye(self.nodes).double()
            self.P = self.alpha * torch.linalg.inv(self.alpha * eye + self.gram)

    def answers(self, x: Tensor) -> Tensor:
        """Of the readout: z beta."""
        return self._features(x) @ self.solver.beta

    def memory(self) -> Mapping[str, Any]:
        """Random features, readout, what old tasks' features span."""
        own = {name: getattr(self, name) for name in ("weights", "biases", "P")}
        return {**own, "gram": self.gram.clone(), "solver": self.solver.state_dict()}

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Inverse of :meth:`memory`."""
        for name in ("weights", "biases", "P"):
            setattr(self, name, memory[name])
        self.gram = memory["gram"].clone()
        width, classes = memory["solver"]["beta"].shape
        self.solver = RecursiveLeastSquares(width, classes, self.alpha)
        self.solver.load_state_dict(memory["solver"])
