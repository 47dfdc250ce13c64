"""Which layers of somebody else's network are its output layers."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from cl_bench.contracts import UsageError
from cl_bench.learners.stages import Stages


class OwnHeads(Stages):
    """Mixin: the heads are those that the owner has named."""

    _head_names: list[str]

    def head_of(self, name: str) -> int | None:
        """Which head a layer or parameter belongs to, by its name; None: to none that is known."""
        for i, head in enumerate(self._head_names):
            if name == head or name.startswith((f"{head}.", f"{head}#")):
                return i
        return None

    def is_guarded_head(self, name: str, heads: str) -> bool | None:
        """Whether ``protect.heads`` guards this layer; None if it is no head that is known.

        Raises:
            UsageError: heads are to be left alone, and none is known.
        """
        if heads == "never" and not self._head_names:
            raise UsageError(
                "protect.heads='never': which layers are heads is not known in somebody else's "
                "model; name them, for example Guarded(..., heads=['head*'])"
            )
        return super().is_guarded_head(name, heads)

    def is_own_head(self, name: str) -> bool:
        """Whether the layer or parameter belongs to a head that came with a task."""
        return len(self.heads) > 1 and super().is_own_head(name)

    def train_heads(self, which: Literal["current", "seen", "all"]) -> None:
        """Which output heads take part in training; one that serves all tasks always does."""
        self.open_heads = which == "all"
        if len(self.heads) > 1:
            super().train_heads(which)


def find_heads(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the output layers, in the order of the patterns, and then of the modules."""
    layers = [name for name, m in model.named_modules() if getattr(m, "weight", None) is not None]
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        fitting = [name for name in layers if fnmatchcase(name, pattern) and name not in found]
        if not fitting:
            raise UsageError(
                f"heads={list(patterns)}: {pattern!r} fits no layer of the model, which has "
                f"{', '.join(layers)}"
            )
        found += fitting
    last: Any = getattr(model, "get_output_embeddings", lambda: None)() if not patterns else None
    return found or [name for name, m in model.named_modules() if m is last and last is not None]
