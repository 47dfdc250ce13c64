"""What optimizers do to gradients that lie in a subspace, and what they know of gradients."""

from cl_bench.optimizers.keeps import OptimizerFactory, place_of, place_of_factory
from cl_bench.optimizers.moments import second_moments

__all__ = ["OptimizerFactory", "place_of", "place_of_factory", "second_moments"]
