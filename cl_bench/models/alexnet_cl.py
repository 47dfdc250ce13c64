"""The AlexNet-like network of the gradient-projection papers, for 32x32 images."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from cl_bench.contracts import UsageError
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, PartShare
from cl_bench.models.dropout import Dropout
from cl_bench.models.norms import NormPolicy, norm1d, norm2d


@checked("model.")
class AlexNetCL(nn.Sequential):
    """Three convolutions and two fully connected layers of width 2048.

    Convolutions of 64, 128 and 256 channels with kernels 4, 3 and 2, each followed by batch
    normalisation, ReLU, dropout and 2x2 max-pooling; features (n, 2048).
    Source: github.com/sahagobinda/GPM @ 1a238ec, main_cifar100.py (after Serra et al., ICML 2018).

    Args:
        input_shape: (channels, height, width) of one sample, at least 22 pixels high and wide.
        width: of the fully connected layers.
        dropout: after the first two convolutions; after the third and the fully connected layers.
        norm: see :data:`NormPolicy`; the papers use ``batch_statistics``.
        bias: whether layers have biases; the papers' have none.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        width: Count = 2048,
        dropout: tuple[PartShare, PartShare] = (0.2, 0.5),
        norm: NormPolicy = "batch_statistics",
        bias: bool = False,
    ) -> None:
        if len(input_shape) != 3 or min(input_shape[1:]) < 22:
            raise UsageError(
                f"model alexnet_cl needs (channels, height, width) images of at least 22x22, the "
                f"stream gives {tuple(input_shape)}: use model=cnn_small or model=mlp"
            )
        early, late = dropout
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        previous = input_shape[0]
        for i, (out, kernel, rate) in enumerate(
            ((64, 4, early), (128, 3, early), (256, 2, late)), start=1
        ):
            layers[f"conv{i}"] = nn.Conv2d(previous, out, kernel, bias=bias)
            layers[f"bn{i}"] = norm2d(norm, out)
            layers[f"relu{i}"] = nn.ReLU()
            layers[f"drop{i}"] = Dropout(rate)
            layers[f"pool{i}"] = nn.MaxPool2d(2)
            previous = out
        layers["flatten"] = nn.Flatten()
        with torch.no_grad():
            previous = nn.Sequential(layers).eval()(torch.zeros(2, *input_shape)).shape[1]
        for i in (1, 2):
            layers[f"fc{i}"] = nn.Linear(previous, width, bias=bias)
            layers[f"bn{i + 3}"] = norm1d(norm, width)
            layers[f"relu{i + 3}"] = nn.ReLU()
            layers[f"drop{i + 3}"] = Dropout(late)
            previous = width
        super().__init__(layers)
        self.train()
