"""How much of what a network computes is of tokens, and how much of padding."""

from torch import Tensor

from cl_bench.contracts import State
from cl_bench.learners.module import BaseLearner


class Filled(BaseLearner):
    """Counts the positions of training's batches, and those that hold tokens."""

    _useful: Tensor | float = 0.0
    _positions: int = 0

    def _filled(self, mask: Tensor, positions: int) -> None:
        """Training takes a batch with these tokens to so many positions of the network."""
        if self.training:
            self._useful, self._positions = self._useful + mask.sum(), self._positions + positions

    def epoch_facts(self) -> dict[str, float]:
        """``useful_tokens``: share of the network's positions that was not padding."""
        if not self._positions:
            return {}
        share = float(self._useful) / self._positions
        self._useful, self._positions = 0.0, 0
        return {"useful_tokens": share}

    def _losses_state(self) -> State:
        counts = {"useful": float(self._useful), "positions": self._positions}
        return {**super()._losses_state(), **counts}

    def _load_losses_state(self, state: State) -> None:
        super()._load_losses_state(state)
        self._useful, self._positions = state.get("useful", 0.0), state.get("positions", 0)
