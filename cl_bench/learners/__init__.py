"""LightningModules that learn a stream's tasks under a strategy."""

from cl_bench.learners.base import BaseLearner, DivergedError, ScheduleFactory
from cl_bench.learners.causal import Causal
from cl_bench.learners.classifier import Classifier
from cl_bench.learners.language import LanguageLearner, language
from cl_bench.learners.seq2seq import Seq2Seq
from cl_bench.learners.services import NORMS, NetworkServices

__all__ = [
    "NORMS",
    "BaseLearner",
    "Causal",
    "Classifier",
    "DivergedError",
    "LanguageLearner",
    "NetworkServices",
    "ScheduleFactory",
    "Seq2Seq",
    "language",
]
