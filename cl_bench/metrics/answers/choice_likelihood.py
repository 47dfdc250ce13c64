"""Which of the allowed answers the model finds likeliest; nothing is generated."""

from cl_bench.metrics.answers.answer import AnswerMetric

METRIC = AnswerMetric(None, sees="choice")
