"""Continual learning experiments: which update rule learns new tasks without losing old ones."""

from typing import TYPE_CHECKING, Any

from cl_bench.version import VERSION

if TYPE_CHECKING:
    from cl_bench.api import Stream, run

__version__ = VERSION

__all__ = ["Stream", "run"]


def __getattr__(name: str) -> Any:
    """What brings torch and lightning with it is imported when somebody asks for it."""
    if name in __all__:
        from cl_bench import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
