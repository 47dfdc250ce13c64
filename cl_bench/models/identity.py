"""No network at all: heads learn on the inputs as they are."""

from torch import Tensor, nn


class Identity(nn.Module):
    """Features are the inputs, flattened: for streams of features."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """(n, ...) to (n, d)."""
        return x.flatten(1)
