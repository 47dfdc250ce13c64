"""How much of what requests name is gone."""

from cl_bench.metrics.summaries.summary import Evidence, Further
from cl_bench.metrics.unlearning import forget_quality


def _of(evidence: Evidence) -> float | None:
    if evidence.requests is None:
        return None
    return forget_quality([forgotten for _, forgotten in evidence.requests])


FURTHER = Further(
    _of, "forgotten on request", "share of what was known of requests' data that is gone", place=17
)
