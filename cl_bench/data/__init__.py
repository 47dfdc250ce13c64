"""Data in memory, and tensors kept on disk because they are slow to make."""

from cl_bench.data.cache import cache_directory, cached, digest
from cl_bench.data.memory import MemoryData

__all__ = ["MemoryData", "cache_directory", "cached", "digest"]
