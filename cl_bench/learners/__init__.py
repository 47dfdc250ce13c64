"""LightningModules that learn a stream's tasks under a strategy."""

from cl_bench.learners.causal import Causal
from cl_bench.learners.classifier import Classifier
from cl_bench.learners.language import language
from cl_bench.learners.module import BaseLearner, ScheduleFactory
from cl_bench.learners.network import NetworkServices
from cl_bench.learners.objective import DivergedError
from cl_bench.learners.seq2seq import Seq2Seq
from cl_bench.learners.text import LanguageLearner

__all__ = [
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
