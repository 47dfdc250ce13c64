"""ACC by the name that tells it from the one by sample, where the two differ."""

from cl_bench.metrics.summaries.acc import average_accuracy
from cl_bench.metrics.summaries.summary import Further

FURTHER = Further(lambda e: None if e.samples is None else average_accuracy(e.R))
