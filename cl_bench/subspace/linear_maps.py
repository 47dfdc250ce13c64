"""Every linear or convolutional layer, seen as one matrix W (o x d) acting on input vectors.

Experts of a mixture, stacked in one weight of three dimensions, are a matrix each.

Gradients of such a layer have their rows in the span of its inputs, so a subspace method needs
two things only: the input vectors, and W as a matrix. This module is the one place that knows
how layers keep them.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cl_bench.subspace.experts import bias_of, expert_weights, is_experts, is_router
from cl_bench.subspace.rows import shared_out

CHUNK_ELEMENTS = 1 << 18
"""Patch matrices are built in pieces of at most this many elements (1 MiB in float32)."""


@dataclass(frozen=True, eq=False)
class LinearMap:
    """One weight matrix of a network: a linear layer, a group of a convolution, or an expert.

    ``d`` counts input features: ``in_features``, or ``C_in / groups * kh * kw`` in the order
    (channel, row, column) of ``F.unfold``; one more where the bias is part of the matrix.

    Attributes:
        name: the layer's qualified name; ``name#g`` for group ``g`` of a grouped convolution and
            for expert ``g``, whose name ends in its parameter's.
        module: ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d``, Hugging Face's ``Conv1D``, or what
            :mod:`cl_bench.subspace.experts` knows: a router, or experts.
        group: which group of the convolution, or which expert.
        augmented: whether the matrix is [W | b], its inputs extended by a constant 1.
        adapted: PEFT's layer around ``module``, where there is one.
        reads: name of another layer whose inputs are this one's too, also while nobody calls it.
    """

    name: str
    module: nn.Module
    group: int = 0
    augmented: bool = False
    adapted: nn.Module | None = None
    reads: str | None = None
    parameter: str = "weight"

    @property
    def weight(self) -> nn.Parameter:
        """The layer's weight, in the layer's own shape."""
        return getattr(self.module, self.parameter)  # type: ignore[no-any-return]

    @property
    def bias(self) -> nn.Parameter | None:
        """The layer's bias, or None."""
        return getattr(self.module, bias_of(self.parameter), None)

    @cached_property
    def stacked(self) -> bool:
        """Whether the weight holds matrices of several experts, this one's among them."""
        return self.parameter != "weight"

    @cached_property
    def transposed(self) -> bool:
        """Whether the layer stores W^T."""
        return is_transposed(self.module)

    @cached_property
    def groups(self) -> int:
        """Groups of the convolution, or experts; 1 for a linear layer."""
        if self.stacked:
            return self.weight.shape[0]
        return self.module.groups if isinstance(self.module, nn.Conv1d | nn.Conv2d) else 1

    @cached_property
    def is_one_tensor(self) -> bool:
        """Whether the matrix is the layer's weight as it lies, and nothing else."""
        return not (self.transposed or self.augmented or self.stacked) and self.groups == 1

    @property
    def is_whole_layer(self) -> bool:
        """Whether the module puts out W x, and maybe a bias; not a router, not experts."""
        return not self.stacked and not is_router(self.module)

    @cached_property
    def out_features(self) -> int:
        """Rows o of the matrix."""
        if self.transposed:
            return self.weight.shape[-1]
        return self.weight.shape[1] if self.stacked else self.weight.shape[0] // self.groups

    @cached_property
    def in_features(self) -> int:
        """Columns d of the matrix."""
        if self.transposed:
            return self.weight.shape[-2] + self.augmented
        own = self.weight[0, 0] if self.stacked else self.weight[0]
        return own.numel() + self.augmented

    @cached_property
    def rows(self) -> slice:
        """Which output features of the layer belong to this map."""
        return slice(self.group * self.out_features, (self.group + 1) * self.out_features)

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(o, d) matrix held in tensors shaped like the layer's weight and bias.

        A view wherever the layout allows; pass the result to :meth:`store` to write it back.
        """
        matrix = self._without_bias(weight)
        if not self.augmented:
            return matrix
        assert bias is not None
        return torch.cat([matrix, self._own_bias(bias)[:, None]], dim=1)

    def _own_bias(self, bias: Tensor) -> Tensor:
        return bias[self.group] if self.stacked else bias[self.rows]

    def _without_bias(self, weight: Tensor) -> Tensor:
        if self.stacked:
            weight = weight[self.group]
            return weight.t() if self.transposed else weight
        if self.transposed:
            return weight.t()
        return (weight if self.groups == 1 else weight[self.rows]).flatten(1)

    def whole(self) -> Tensor:
        """W (o, d), without bias and detached; of all rows, whichever process holds them."""
        weight = self.weight.detach()
        return self._without_bias(weight.full_tensor() if isinstance(weight, DTensor) else weight)

    def merged(self) -> Tensor:
        """W (o, d) as it acts now, without bias: what adapters make of it."""
        if self.adapted is None:
            return self.whole()
        return self._without_bias(acting_weight(self.adapted))

    def store(self, matrix: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Write an (o, d) matrix into tensors shaped like the layer's weight and bias."""
        if self.augmented:
            assert bias is not None
            self._own_bias(bias).copy_(matrix[:, -1])
            matrix = matrix[:, :-1]
        if self.stacked or self.transposed:
            target = self._without_bias(weight)
        else:
            target = weight if self.groups == 1 else weight[self.rows]
        if matrix.data_ptr() != target.data_ptr():
            target.copy_(matrix.reshape(target.shape))

    def inputs(self, x: Tensor) -> Iterator[Tensor]:
        """Input vectors as (n, d) matrices, a bounded number at a time.

        Args:
            x: the tensor that enters the layer.
        """
        if isinstance(self.module, nn.Conv1d | nn.Conv2d):
            pieces: Iterator[Tensor] = _patches(self.module, self.group, x)
        else:
            pieces = iter([x.reshape(-1, x.shape[-1])])
        for piece in pieces:
            yield F.pad(piece, (0, 1), value=1.0) if self.augmented else piece


def first_uses(layers: Sequence[LinearMap]) -> list[LinearMap]:
    """For every layer, the first of those that have its weight: itself, unless weights are shared.

    One weight has one gradient, and so one subspace, which holds the inputs of all its uses.
    """
    known: dict[tuple[Tensor, int], LinearMap] = {}
    return [known.setdefault((layer.weight, layer.group), layer) for layer in layers]


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores W^T (d x o): Hugging Face's ``Conv1D``, and some experts."""
    if is_experts(module):
        return bool(module.is_transposed)
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_adapted(module: nn.Module) -> bool:
    """Whether the module is PEFT's, around a layer that it adapts."""
    return hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names")


def merge_adapted(adapted: Any) -> None:
    """Write what adapters make of a layer's weight into it."""
    weight = adapted.get_base_layer().weight
    if isinstance(weight, DTensor):  # PEFT's own way knows of no parts
        weight.add_(shared_out(added_weight(adapted), weight))
    else:
        adapted.merge()


@torch.no_grad()
def acting_weight(adapted: Any) -> Tensor:
    """What adapters make of the weight of the layer they adapt, whole and in its shape.

    They need not add to it: some turn it. The layer is as before, to the bit.
    """
    base = adapted.get_base_layer()
    weight = base.weight
    if isinstance(weight, DTensor):
        whole = weight.full_tensor()
        return whole + added_weight(adapted).to(whole)
    if adapted.merged:
        return weight.detach()  # type: ignore[no-any-return]
    before = [(p, p.detach().clone()) for p in base.parameters(recurse=False)]
    adapted.merge()
    acting: Tensor = weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # OSF's layers cannot take back what they have merged
        adapted.unmerge()
    if adapted.merged:
        adapted.merged_adapters.clear()
    for parameter, value in before:
        parameter.copy_(value)
    return acting


def added_weight(adapted: Any) -> Tensor:
    """What PEFT's active LoRA adds to the weight of the layer it adapts, in its shape."""
    with torch.no_grad():
        added = [adapted.get_delta_weight(name) for name in adapted.active_adapters]
        return torch.stack(added).sum(0)


def plain_modules(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by name, as if nothing were adapted: PEFT's own parts are left out."""
    inside: str | None = None
    for name, module in network.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if is_adapted(module):
            inside = f"{name}."
        yield name, module


def merged_parameters(network: nn.Module) -> dict[str, Tensor]:
    """Parameters under the names they have where nothing is adapted, adapters merged into them."""
    found: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, module in plain_modules(network):
        adapted: Any = module if is_adapted(module) else None
        layer = module if adapted is None else adapted.base_layer
        for part, parameter in layer.named_parameters(recurse=False):
            if id(parameter) in known:
                continue
            known.add(id(parameter))
            acts = adapted is not None and part == "weight"
            found[f"{name}.{part}" if name else part] = (
                acting_weight(adapted) if acts else parameter.detach()
            )
    return found


def linear_maps(name: str, module: nn.Module, augment: bool = False) -> list[LinearMap]:
    """The linear maps of one layer; an empty list if the module is no such layer.

    Args:
        name: the layer's qualified name.
        module: any module.
        augment: take the bias, if there is one, into the matrix.
    """
    if type(module).__name__.endswith("NonDynamicallyQuantizableLinear"):
        return []  # attention's output layer: nn.MultiheadAttention never calls its forward
    if is_adapted(module):
        layer: Any = module
        return [replace(m, adapted=module) for m in linear_maps(name, layer.base_layer, augment)]
    if is_experts(module):
        return [
            LinearMap(
                f"{name}.{parameter}#{g}",
                module,
                g,
                augment and hasattr(module, bias_of(parameter)),
                parameter=parameter,
            )
            for parameter in expert_weights(module)
            for g in range(getattr(module, parameter).shape[0])
        ]
    augmented = augment and getattr(module, "bias", None) is not None
    if isinstance(module, nn.Linear) or is_transposed(module) or is_router(module):
        return [LinearMap(name, module, augmented=augmented)]
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        groups = module.groups
        names = [name] if groups == 1 else [f"{name}#{g}" for g in range(groups)]
        return [LinearMap(n, module, g, augmented) for g, n in enumerate(names)]
    return []


def _padding(conv: nn.Conv1d | nn.Conv2d) -> list[int]:
    """What a convolution adds before and after, the last dimension first, as ``F.pad`` has it."""
    sizes = list(zip(conv.kernel_size, conv.dilation, strict=True))
    if conv.padding == "same":
        gaps = [dilation * (size - 1) for size, dilation in sizes]
        pairs = [(gap // 2, gap - gap // 2) for gap in gaps]
    elif conv.padding == "valid":
        pairs = [(0, 0) for _ in sizes]
    else:
        pairs = [(int(p), int(p)) for p in conv.padding]
    return [p for pair in reversed(pairs) for p in pair]


def _patches(conv: nn.Conv1d | nn.Conv2d, group: int, x: Tensor) -> Iterator[Tensor]:
    """Receptive fields of one group as rows (n * L, d), some images at a time."""
    channels = conv.in_channels // conv.groups
    x = x[:, group * channels : (group + 1) * channels]
    kernel, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
    padding = _padding(conv)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    positions = math.prod(max(1, size // s) for size, s in zip(x.shape[2:], stride, strict=True))
    d = channels * math.prod(kernel)
    images = max(1, CHUNK_ELEMENTS // (positions * d))
    for start in range(0, x.shape[0], images):
        piece = F.pad(x[start : start + images], padding, mode=mode)
        if isinstance(conv, nn.Conv1d):
            unfolded = F.unfold(
                piece.unsqueeze(2), (1, *kernel), dilation=(1, *dilation), stride=(1, *stride)
            )
        else:
            unfolded = F.unfold(piece, kernel, dilation=dilation, stride=stride)
        yield unfolded.transpose(1, 2).reshape(-1, d)
