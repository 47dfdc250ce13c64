"""Made-up people: biographies to read, questions to answer."""

from cl_bench.tasks.biography.stream import Biography, BiographyTask

__all__ = ["Biography", "BiographyTask"]
