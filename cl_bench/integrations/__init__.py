"""The same strategies inside other people's loops: plain PyTorch, Lightning, Hugging Face."""

from typing import Any

from cl_bench.integrations.lightning import ContinualCallback
from cl_bench.integrations.pytorch import Guarded

__all__ = ["ContinualCallback", "GuardCallback", "Guarded"]


def __getattr__(name: str) -> Any:
    if name != "GuardCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cl_bench.integrations.huggingface import GuardCallback

    return GuardCallback
