"""The one exception of the contracts; it lives where no torch is needed to import it."""

from cl_bench.errors import UsageError

__all__ = ["UsageError"]
