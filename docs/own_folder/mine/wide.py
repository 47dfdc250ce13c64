"""A model gives features; the learner puts the heads on top."""

import math
from collections.abc import Sequence

from torch import nn


class Wide(nn.Sequential):
    """One wide hidden layer.

    Args:
        input_shape: of one sample; the stream's, handed over.
        width: of the layer.
    """

    def __init__(self, input_shape: Sequence[int], width: int = 256) -> None:
        super().__init__(nn.Flatten(), nn.Linear(math.prod(input_shape), width), nn.ReLU())
