"""The multi-layer perceptron of the permuted-MNIST literature."""

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from cl_bench.contracts import UsageError


class MLP(nn.Sequential):
    """Linear layers with ReLU between them, on flattened inputs.

    Args:
        input_shape: shape of one sample.
        hidden: widths of the hidden layers; the last one is the feature width.
        bias: whether layers have biases; without them (as in GPM, Saha et al. 2021) protecting a
            subspace of the inputs protects the whole function.
    """

    def __init__(
        self, input_shape: Sequence[int], hidden: Sequence[int] = (100, 100), bias: bool = False
    ) -> None:
        if not hidden or min(hidden) < 1:
            raise UsageError(f"model.hidden={list(hidden)}: name at least one width, each >= 1")
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        width = math.prod(input_shape)
        for i, out in enumerate(hidden, start=1):
            layers[f"fc{i}"] = nn.Linear(width, out, bias=bias)
            layers[f"relu{i}"] = nn.ReLU(inplace=True)
            width = out
        super().__init__(layers)
