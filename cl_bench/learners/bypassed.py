"""Layers whose weight a language model uses without calling them, which no tap can watch."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cl_bench.learners.modes import same_modes
from cl_bench.subspace import linear_maps


class _Uses(TorchFunctionMode):
    """Notes which layers' weights are used while the layer itself is not called."""

    def __init__(self, layers: dict[int, nn.Module]) -> None:
        super().__init__()
        self.layers = layers
        self.inside: list[nn.Module] = []
        self.found: set[nn.Module] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As ``func``; looks at what it is given first."""
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, Tensor | list | tuple) or isinstance(out, torch.Size):
            return out  # what it is asked for is its dtype, its shape, its device
        for value in (*args, *(kwargs or {}).values()):
            layer = self.layers.get(id(value)) if isinstance(value, Tensor) else None
            if layer is not None and layer not in self.inside:
                self.found.add(layer)
        return out


@torch.no_grad()
def bypassed(model: Any) -> frozenset[nn.Module]:
    """Linear and convolutional layers of which ``model`` reads the weight behind their back.

    A text of two tokens is read in evaluation mode. Nothing is drawn at random. None of a model on
    the meta device, which cannot read.
    """
    if next(model.parameters()).is_meta:  # nothing can be read without numbers
        return frozenset()
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    layers = {
        id(maps[0].weight): module
        for module in model.modules()
        if (maps := linear_maps("", module)) and maps[0].weight not in tables
    }
    uses = _Uses(layers)

    def enter(module: nn.Module, args: Any) -> None:
        uses.inside.append(module)

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        uses.inside.pop()

    known = set(layers.values())
    handles = [
        h
        for m in known
        for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))
    ]
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    try:
        with same_modes(model), uses:
            model.eval()
            model(input_ids=tokens, use_cache=False, **more)
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(uses.found)
