"""How much of what a network computes is of tokens, and how much of padding."""

import torch
from torch import Tensor

from cl_bench.contracts import State
from cl_bench.learners.module import BaseLearner
from cl_bench.parallel.ranks import average_, world


class Filled(BaseLearner):
    """Counts the positions of training's batches, and those that hold tokens."""

    _useful: Tensor | float = 0.0
    _positions: float = 0

    def _filled(self, mask: Tensor, positions: int) -> None:
        """Training takes a batch with these tokens to so many positions of the network."""
        if self.training:
            self._useful, self._positions = self._useful + mask.sum(), self._positions + positions

    def epoch_facts(self) -> dict[str, float]:
        """``useful_tokens``: share of the network's positions that was not padding."""
        if not self._positions:
            return {}
        self._over_processes()
        share = float(self._useful) / self._positions
        self._useful, self._positions = 0.0, 0
        return {"useful_tokens": share}

    def _over_processes(self) -> None:
        """Each has taken parts of batches: the mean of what all have counted."""
        if world() > 1:
            where = next(self.network.parameters()).device
            counts = torch.tensor(
                [float(self._useful), self._positions], dtype=torch.float64, device=where
            )
            self._useful, self._positions = average_(counts).tolist()

    def _losses_state(self) -> State:
        self._over_processes()
        counts = {"useful": float(self._useful), "positions": self._positions}
        return {**super()._losses_state(), **counts}

    def _load_losses_state(self, state: State) -> None:
        super()._load_losses_state(state)
        self._useful, self._positions = state.get("useful", 0.0), state.get("positions", 0)
