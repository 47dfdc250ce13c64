"""The reduced ResNet-18 of GEM (Lopez-Paz & Ranzato, NeurIPS 2017) and of its successors."""

from collections.abc import Sequence

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cl_bench.contracts import UsageError
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count
from cl_bench.models.norms import NormPolicy, norm2d


@checked("model.")
class ResNet18Small(nn.Module):
    """ResNet-18 with ``nf`` filters in its first stage and a 3x3 stem.

    Features are 2x2 average-pooled maps, flattened: (n, 32 nf) from 32x32 images.
    Source: github.com/sahagobinda/GPM @ 1a238ec, main_five_dataset.py.

    Args:
        input_shape: (channels, height, width) of one sample.
        nf: filters of the first stage; later stages have 2, 4 and 8 times as many.
        stem_stride: 1 for 32x32 images, 2 for the 84x84 ones of miniImageNet.
        norm: see :data:`NormPolicy`; the papers use ``batch_statistics``.
        bias: whether convolutions have biases; the papers' have none.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        nf: Count = 20,
        stem_stride: Count = 1,
        norm: NormPolicy = "batch_statistics",
        bias: bool = False,
    ) -> None:
        super().__init__()
        if len(input_shape) != 3 or min(input_shape[1:]) < 16 * stem_stride:
            raise UsageError(
                f"model resnet18_small needs (channels, height, width) images of at least "
                f"{16 * stem_stride} pixels, the stream gives {tuple(input_shape)}: use "
                "model=cnn_small or model=mlp"
            )
        self.conv1 = nn.Conv2d(input_shape[0], nf, 3, stride=stem_stride, padding=1, bias=bias)
        self.bn1 = norm2d(norm, nf)
        widths = [nf, nf, 2 * nf, 4 * nf, 8 * nf]
        for i in range(1, 5):
            stride = 1 if i == 1 else 2
            stage = nn.Sequential(
                BasicBlock(widths[i - 1], widths[i], stride, norm, bias),
                BasicBlock(widths[i], widths[i], 1, norm, bias),
            )
            self.add_module(f"layer{i}", stage)

    def blocks(self) -> list[nn.Module]:
        """Stem, then the eight residual blocks."""
        stem = nn.ModuleList([self.conv1, self.bn1])
        return [stem, *(m for m in self.modules() if isinstance(m, BasicBlock))]

    def forward(self, x: Tensor) -> Tensor:
        """Features of images (n, *input_shape)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for i in range(1, 5):
            x = self.get_submodule(f"layer{i}")(x)
        return F.avg_pool2d(x, 2).flatten(1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where shapes change."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, norm: NormPolicy, bias: bool
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)
        self.bn1 = norm2d(norm, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias)
        self.bn2 = norm2d(norm, outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=bias), norm2d(norm, outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        return F.relu(out)
