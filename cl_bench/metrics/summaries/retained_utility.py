"""What requests to forget leave of everything else."""

from cl_bench.metrics.summaries.summary import Evidence, Further
from cl_bench.metrics.unlearning import retained_utility


def _of(evidence: Evidence) -> float | None:
    if evidence.requests is None:
        return None
    return retained_utility([scores for scores, _ in evidence.requests])


FURTHER = Further(
    _of, "kept", "mean over all tasks after the last request, over that before any", place=18
)
