"""Layers in a row, whose units can be masked: what one puts out, unit by unit, the next one reads.

A unit is an output feature of a linear layer or a channel of a convolution. A mask multiplies what
the *next* layer reads of it: activations, pooling, dropout and batch normalisation in between may
do what they like with a unit, and one whose mask is 0 has no part in anything.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cl_bench.subspace.linear_maps import LinearMap


class UnitChain:
    """Some layers in forward order, and the layers that read the last one of them.

    Args:
        layers: the chain.
        readers: output layers, any of which a forward pass may call.

    Attributes:
        units: how many each layer of the chain has.
    """

    def __init__(self, layers: Sequence[LinearMap], readers: Sequence[LinearMap]) -> None:
        self.layers, self.readers = list(layers), list(readers)
        self.units = [layer.out_features for layer in self.layers]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Weights and biases of all layers and readers."""
        found = [p for m in [*self.layers, *self.readers] for p in (m.weight, m.bias)]
        return [p for p in found if p is not None]

    @property
    def _reading(self) -> Iterable[tuple[int, LinearMap]]:
        """Every layer that reads units, with the position of the layer that has them."""
        yield from enumerate(self.layers[1:])
        yield from ((len(self.layers) - 1, reader) for reader in self.readers)

    def attach(self, mask: Callable[[int, bool], Tensor]) -> list[RemovableHandle]:
        """From now on multiply what each layer's units say; the handles end it.

        Args:
            mask: of a layer's position and whether it trains: (units,).
        """

        def hook(i: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
            def multiply(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
                return args[0] * _along(mask(i, module.training), module, args[0]), *args[1:]

            return multiply

        return [layer.module.register_forward_pre_hook(hook(i)) for i, layer in self._reading]

    def taken(self, masks: Sequence[Tensor]) -> dict[nn.Parameter, Tensor]:
        """How much of each parameter belongs to units with these masks, in its shape or broadcast.

        A weight from unit j to unit i: min(mask_i, mask_j); a bias: its unit's mask. All inputs of
        the first layer and all outputs of readers count as 1.
        """
        inside = zip([None, *masks[:-1]], self.layers, masks, strict=True)
        outside = ((masks[-1], r, masks[-1].new_ones(r.out_features)) for r in self.readers)
        found = {}
        for source, layer, target in [*inside, *outside]:
            weight, beyond = layer.weight, [1] * (layer.weight.dim() - 2)
            share = target[:, None]
            if source is not None:
                each = source.repeat_interleave(weight.shape[1] // len(source))
                share = torch.minimum(share, each[None])
            found[weight] = share.reshape(*share.shape, *beyond)
            if layer.bias is not None:
                found[layer.bias] = target
        return found

    def require(self, run: Callable[[Tensor], object], x: Tensor) -> None:
        """Raise :class:`ValueError` unless the layers are such a chain.

        Args:
            run: a forward pass of inputs, in evaluation mode.
            x: some inputs.
        """
        for layer in [*self.layers, *self.readers]:
            if layer.groups > 1 or layer.transposed:
                raise ValueError(f"layer {layer.name!r} is a grouped convolution, or transposed")
        if not self.layers:
            raise ValueError("no layer has units")
        leaves: list[Tensor] = []

        def put_out(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            leaves.append(out.detach().requires_grad_())
            return leaves[-1].clone()  # what follows may write in place

        def reads(i: int, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                if len(leaves) != i + 2 or not _reads(module, args[0], leaves, self.units[i]):
                    raise ValueError(
                        f"what layer {name!r} reads is not, unit by unit, what layer "
                        f"{self.layers[i].name!r} puts out"
                    )

            return look

        found = [m.module.register_forward_pre_hook(reads(i, m.name)) for i, m in self._reading]
        found += [layer.module.register_forward_hook(put_out) for layer in self.layers]
        try:
            with torch.enable_grad():
                leaves.append(x.detach().requires_grad_())
                run(leaves[0].clone())
        finally:
            for handle in found:
                handle.remove()
        if len(leaves) != len(self.layers) + 1:
            raise ValueError("a forward pass does not call every layer once")


def _along(mask: Tensor, module: nn.Module, x: Tensor) -> Tensor:
    """A mask of units (u,) in a shape that multiplies what the module reads of them."""
    if isinstance(module, nn.Linear):
        return mask.repeat_interleave(x.shape[-1] // len(mask))
    return mask.reshape(-1, *[1] * (x.dim() - 2))


def _reads(module: nn.Module, x: Tensor, leaves: Sequence[Tensor], units: int) -> bool:
    """Whether x depends on the last of the leaves alone, and each unit's part on that unit."""
    linear = isinstance(module, nn.Linear)
    size = x.shape[-1] if linear else x.shape[1]
    if not x.requires_grad or size % units or not (linear or size == units):
        return False
    chosen = torch.rand(units, generator=torch.Generator().manual_seed(units)) < 0.5
    for some in (chosen, ~chosen):
        value = (x * _along(some.to(x), module, x)).sum()
        *others, own = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
        if own is None or any(g is not None and bool(g.any()) for g in others):
            return False
        dimension = 1 if own.dim() > 2 else own.dim() - 1
        if bool(own.movedim(dimension, 0)[~some.to(own.device)].any()):
            return False
    return True
