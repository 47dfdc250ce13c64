"""Equal once normalised."""

from cl_bench.metrics.answers.answer import AnswerMetric, normalised


def exact_match(text: str, right: str, given: str) -> float:
    """1 where both are equal once normalised; an empty answer scores 0."""
    found = normalised(given)
    return float(bool(found) and found == normalised(right))


METRIC = AnswerMetric(exact_match)
