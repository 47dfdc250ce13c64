"""LightningModules that learn a stream's tasks under a strategy."""

from cl_bench.learners.base import BaseLearner, DivergedError, ScheduleFactory
from cl_bench.learners.causal import Causal
from cl_bench.learners.classifier import Classifier
from cl_bench.learners.services import NORMS, NetworkServices

__all__ = [
    "NORMS",
    "BaseLearner",
    "Causal",
    "Classifier",
    "DivergedError",
    "NetworkServices",
    "ScheduleFactory",
]
