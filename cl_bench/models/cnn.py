"""A small convolutional network for small images."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from cl_bench.contracts import UsageError
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, Widths


@checked("model.")
class SmallCNN(nn.Sequential):
    """3x3 convolutions with ReLU and 2x2 max-pooling, then one fully connected layer.

    Args:
        input_shape: (channels, height, width) of one sample.
        channels: output channels of the convolutions, each followed by pooling.
        width: width of the fully connected layer, the feature width.
        bias: whether layers have biases.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        channels: Widths = (32, 64),
        width: Count = 256,
        bias: bool = False,
    ) -> None:
        if len(input_shape) != 3:
            raise UsageError(
                f"model cnn_small needs (channels, height, width) inputs, the stream gives "
                f"{tuple(input_shape)}: use model=mlp"
            )
        if min(input_shape[1:]) < 2 ** len(channels):
            raise UsageError(
                f"model.channels={list(channels)}: {len(channels)} poolings leave nothing of "
                f"{input_shape[1]}x{input_shape[2]} images; name fewer"
            )
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        previous = input_shape[0]
        for i, out in enumerate(channels, start=1):
            layers[f"conv{i}"] = nn.Conv2d(previous, out, 3, padding=1, bias=bias)
            layers[f"relu{i}"] = nn.ReLU()
            layers[f"pool{i}"] = nn.MaxPool2d(2)
            previous = out
        layers["flatten"] = nn.Flatten()
        with torch.no_grad():
            flat = nn.Sequential(layers)(torch.zeros(1, *input_shape)).shape[1]
        layers["fc"] = nn.Linear(flat, width, bias=bias)
        layers["relu_fc"] = nn.ReLU()
        super().__init__(layers)
