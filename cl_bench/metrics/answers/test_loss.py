"""exp(-loss), loss being the mean over an answer's tokens: a sample's likelihood of a token.

In (0, 1], and more is better, as of every score; the loss itself, in nats, stands beside it.
Nothing is generated.
"""

from cl_bench.metrics.answers.answer import AnswerMetric

METRIC = AnswerMetric(None, sees="loss")
