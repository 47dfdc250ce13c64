"""Masters: float32 weights that optimizers step, of which passes see what half precision makes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Rounding:
    """Has modules compute with copies of their weights in half precision, made for each pass.

    Gradients come back through the rounding, in the precision of the weights. What counts in
    float32 itself (running statistics) keeps its weights so.

    Args:
        dtype: of the copies, and of what enters the modules.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._kept: list[list[tuple[Any, str, nn.Parameter]]] = []
        self._handles: list[RemovableHandle] = []

    def __repr__(self) -> str:
        return f"Rounding({self.dtype})"

    def attach(self, modules: Iterable[nn.Module], inputs: bool = True) -> None:
        """From now on these compute so, whoever calls them; one inside another changes nothing.

        Args:
            modules: of a network.
            inputs: whether what enters them is rounded as well.
        """
        for module in modules:
            enter = self._enter if inputs else self._put
            self._handles += [
                module.register_forward_pre_hook(enter, with_kwargs=inputs),
                module.register_forward_hook(self._leave, always_call=True),
            ]

    @property
    def attached(self) -> bool:
        """Whether any module computes so."""
        return bool(self._handles)

    def detach(self) -> None:
        """Modules compute with their weights again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def held(self, network: nn.Module) -> Iterator[None]:
        """Inside, many passes see one copy of the weights, which nobody changes."""
        self._put(network)
        try:
            yield
        finally:
            self._restore()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self._put(module)
        return tuple(map(self._of, args)), {k: self._of(v) for k, v in kwargs.items()}

    def _leave(self, *_: Any) -> None:
        self._restore()

    def _put(self, module: nn.Module, _: Any = None) -> None:
        kept: list[tuple[Any, str, nn.Parameter]] = []
        copies: dict[nn.Parameter, Tensor] = {}  # a tied weight is rounded once
        for part in module.modules():
            if any(buffer.is_floating_point() for buffer in part.buffers(recurse=False)):
                continue
            for name, weight in part._parameters.items():
                if weight is not None and weight.dtype == torch.float32:
                    kept.append((part._parameters, name, weight))
                    if weight not in copies:
                        copies[weight] = weight.to(self.dtype)
        self._kept.append(kept)
        for tensors, name, weight in kept:
            tensors[name] = copies[weight]

    def _restore(self) -> None:
        for tensors, name, weight in self._kept.pop():
            tensors[name] = weight

    def _of(self, value: Any) -> Any:
        wide = isinstance(value, Tensor) and value.dtype == torch.float32
        return value.to(self.dtype) if wide else value
