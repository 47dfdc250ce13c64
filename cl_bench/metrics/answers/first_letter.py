"""Equal in the first character."""

from cl_bench.metrics.answers.answer import AnswerMetric


def first_letter(text: str, right: str, given: str) -> float:
    """1 where the first characters are equal: TRACE's ScienceQA, explanations left aside."""
    return float(given.strip()[:1] != "" and given.strip()[:1] == right.strip()[:1])


METRIC = AnswerMetric(first_letter)
