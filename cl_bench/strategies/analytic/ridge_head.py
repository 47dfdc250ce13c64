"""Ridge regression on random features of a frozen network.

With f the network's features (d,) and R (d, M) drawn once, a sample is read as h = relu(R^T f),
and W = (G + lambda I)^-1 Q, Q = (s_1, ..., s_C), gives its logits W^T h.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cl_bench.contracts import Batch, Learner, State, Statistics, Task, UsageError, generator
from cl_bench.strategies.analytic.closed_form import ClosedForm
from cl_bench.subspace import Sums, chosen, solve_ridge

HELD = 5
"""One sample of so many is held out."""

WORDS = 1024
"""Numbers of a sample that decide whether it is."""


class RidgeHead(ClosedForm):
    """Keeps G; solves for W when it is asked.

    Where there are several strengths, one sample in five, known by its content, is held out: of W
    fitted on the others, that of the least squared error on these tells the strength (see
    :func:`~cl_bench.subspace.chosen`). Then W is fitted on all.

    Args:
        width: M; 0 reads the features themselves.
        strengths: for lambda.
        seed: R is drawn with; None takes the run's.
        epochs: of the first task; None takes the run's.

    Attributes:
        drawn: the seed that R is drawn with.
    """

    squares = True

    def __init__(
        self, width: int, strengths: Sequence[float], seed: int | None, epochs: int | None
    ) -> None:
        self.strengths = sorted(strengths)
        self.parts = 1 if len(strengths) == 1 else 2
        super().__init__(epochs)
        self.width = width
        self.seed = self.drawn = seed
        self._projection: Tensor | None = None
        self._solved: tuple[float, Tensor] | None = None

    @abstractmethod
    def draw(self, d: int, rng: torch.Generator) -> Tensor:
        """R (d, M)."""

    def check(self, learner: Learner) -> None:
        """Take the seed down: a client's learner has another."""
        super().check(learner)
        if self.seed is None:
            self.drawn = learner.seed

    def read(self, learner: Learner, batch: Batch) -> Tensor:
        """relu(R^T f), in the precision of f."""
        f = learner.features(batch)
        if not self.width:
            return f
        if self._projection is None or len(self._projection) != f.shape[1]:
            seed = learner.seed if self.drawn is None else self.drawn
            self._projection = self.draw(f.shape[1], generator(seed, "random features"))
        self._projection = self._projection.to(f.device)
        return (f @ self._projection.to(f.dtype)).relu()

    def part_of(self, batch: Batch) -> Tensor:
        """0, or 1 if it is held out: by the bytes of ``x``, so copies are on the same side."""
        if self.parts == 1:
            return super().part_of(batch)
        x = batch["x"].cpu().flatten(1)
        x = x[:, :: max(1, x.shape[1] // WORDS)].contiguous().view(torch.uint8).long()
        keys = torch.randint(2**31, x.shape[1:], generator=generator(0, "held out"))
        return (x @ keys % HELD == 0).long()

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """W is out of date."""
        super().consolidate(learner, task, stats)
        self._solved = None

    def solve(self) -> tuple[float, Tensor]:
        """Lambda and W (M, C).

        Raises:
            UsageError: G + lambda I is singular.
        """
        if self._solved is None:
            fit, *held = (
                Sums(gram, sums.t(), float(counts.sum()))
                for gram, sums, counts in zip(self.grams, self.sums, self.counts, strict=True)
            )
            strength = chosen(fit, held[0], self.strengths) if held else self.strengths[0]
            W = solve_ridge(fit + held[0] if held else fit, strength)
            if W is None:
                raise UsageError(
                    f"lambda={strength:g} leaves the features' second moments singular; allow a "
                    "larger one"
                )
            self._solved = strength, W
        return self._solved

    def scores(self, h: Tensor, classes: list[int]) -> Tensor:
        """W^T h."""
        return h @ self.solve()[1].to(h)[:, classes]

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """What the head is solved with."""
        if not self.counts.numel():
            return {}
        return {"ridge": {"lambda": self.solve()[0], "width": float(self.sums.shape[2])}}

    def state_dict(self) -> State:
        """The sums, and the seed of R."""
        return {**super().state_dict(), "seed": self.drawn}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.drawn = state["seed"]
        self._projection = self._solved = None
