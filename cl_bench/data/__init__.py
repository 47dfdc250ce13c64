"""Data in memory, and tensors kept on disk because they are slow to make."""

from cl_bench.data.cache import alone, cache_directory, cached, digest, present
from cl_bench.data.memory import MemoryData

__all__ = ["MemoryData", "alone", "cache_directory", "cached", "digest", "present"]
