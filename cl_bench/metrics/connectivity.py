"""Whether two sets of weights are connected by a straight line of low loss."""

from collections.abc import Sequence

import numpy as np


def barrier(along: Sequence[float], losses: Sequence[float]) -> float:
    """max_a L(a) - [(1 - a) L(0) + a L(1)]: what the path's loss rises above its ends.

    0 where no place in between lies above the straight line through the ends' losses. Entezari,
    Sedghi, Saukh & Neyshabur, "The role of permutation invariance in linear mode connectivity of
    neural networks", ICLR 2022, definition 1. NaN if a loss is not finite.

    Args:
        along: places from 0 to 1, rising, both ends among them.
        losses: L at each.
    """
    a, loss = np.asarray(along, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    return float(np.max(loss - (1 - a) * loss[0] - a * loss[-1]))
