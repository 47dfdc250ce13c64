"""Equal as they are."""

from cl_bench.metrics.answers.answer import AnswerMetric


def verbatim(text: str, right: str, given: str) -> float:
    """1 where both are equal but for white space around them: points, signs and case count.

    TRACE's own accuracy compares the strings as they are (its metrics.py).
    """
    return float(bool(given.strip()) and given.strip() == right.strip())


METRIC = AnswerMetric(verbatim)
