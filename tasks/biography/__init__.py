"""Made-up people: biographies to read, questions to answer."""

from cl_bench.tasks.biography.stream import Biography, BiographyTask
from cl_bench.tasks.biography.unlearn import UnlearnBiography

__all__ = ["Biography", "BiographyTask", "UnlearnBiography"]
