"""The LeNet of the gradient-projection papers, for 32x32 images."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from cl_bench.contracts import UsageError
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Widths


@checked("model.")
class LeNet(nn.Sequential):
    """5x5 convolutions of 20 and 50 channels, then layers of width 800 and 500.

    ReLU, local response normalisation and overlapping 3x2 max-pooling after each convolution;
    weights start as He et al. (2015) propose for ReLU; features (n, 500).
    Source: github.com/sahagobinda/GPM @ 1a238ec, main_cifar_superclass.py.

    Args:
        input_shape: (channels, height, width) of one sample.
        widths: of the fully connected layers.
        bias: whether layers have biases; the papers' have none.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        widths: Widths = (800, 500),
        bias: bool = False,
    ) -> None:
        if len(input_shape) != 3:
            raise UsageError(
                f"model lenet needs (channels, height, width) inputs, the stream gives "
                f"{tuple(input_shape)}: use model=mlp"
            )
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        previous = input_shape[0]
        for i, out in enumerate((20, 50), start=1):
            layers[f"conv{i}"] = nn.Conv2d(previous, out, 5, padding=2, bias=bias)
            layers[f"relu{i}"] = nn.ReLU()
            layers[f"lrn{i}"] = nn.LocalResponseNorm(4, alpha=0.001 / 9.0, beta=0.75, k=1.0)
            layers[f"pool{i}"] = nn.MaxPool2d(3, stride=2, padding=1)
            previous = out
        layers["flatten"] = nn.Flatten()
        with torch.no_grad():
            previous = nn.Sequential(layers)(torch.zeros(1, *input_shape)).shape[1]
        for i, width in enumerate(widths, start=1):
            layers[f"fc{i}"] = nn.Linear(previous, width, bias=bias)
            layers[f"relu_fc{i}"] = nn.ReLU()
            previous = width
        super().__init__(layers)
        for layer in self:
            if isinstance(layer, nn.Linear | nn.Conv2d):
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
