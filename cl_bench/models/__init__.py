"""Networks that turn inputs into features; the learner adds the heads."""

from cl_bench.models.cnn import SmallCNN
from cl_bench.models.mlp import MLP

__all__ = ["MLP", "SmallCNN"]
