"""Continual learning experiments: which update rule learns new tasks without losing old ones."""

from typing import TYPE_CHECKING, Any

from cl_bench.version import VERSION

if TYPE_CHECKING:
    from cl_bench.api import run

__version__ = VERSION

__all__ = ["run"]


def __getattr__(name: str) -> Any:
    """``run`` brings torch and lightning with it, so it is imported when somebody asks for it."""
    if name == "run":
        from cl_bench.api import run

        return run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
