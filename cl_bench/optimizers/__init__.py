"""What optimizers do to gradients that lie in a subspace."""

from cl_bench.optimizers.keeps import OptimizerFactory, place_of, place_of_factory

__all__ = ["OptimizerFactory", "place_of", "place_of_factory"]
