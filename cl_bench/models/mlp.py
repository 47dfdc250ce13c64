"""The multi-layer perceptron of the permuted-MNIST literature."""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cl_bench.contracts import UsageError
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import PartShare, Widths
from cl_bench.models.dropout import Dropout


@checked("model.")
class MLP(nn.Sequential):
    """Linear layers with ReLU between them, on flattened inputs.

    Args:
        input_shape: shape of one sample.
        hidden: widths of the hidden layers; the last one is the feature width.
        dropout: share of each hidden layer's outputs that is dropped in training; one a layer, or
            none at all.
        bias: whether layers have biases; without them (as in GPM, Saha et al. 2021) protecting a
            subspace of the inputs protects the whole function.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        hidden: Widths = (100, 100),
        bias: bool = False,
        dropout: Sequence[PartShare] = (),
    ) -> None:
        if len(dropout) not in (0, len(hidden)):
            raise UsageError(
                f"model.dropout={list(dropout)}: one share for each of the "
                f"{len(hidden)} hidden layers, or []"
            )
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        width = math.prod(input_shape)
        for i, out in enumerate(hidden, start=1):
            layers[f"fc{i}"] = nn.Linear(width, out, bias=bias)
            if dropout:
                layers[f"drop{i}"] = Dropout(dropout[i - 1])
            width = out
        super().__init__(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, width) of inputs (n, *input_shape)."""
        x = x.flatten(1)
        for layer in self:  # to call a module, a ReLU's for example, takes as long as to apply it
            x = layer(x)
            if type(layer) is not Dropout:
                x = torch.relu_(x)
        return x
