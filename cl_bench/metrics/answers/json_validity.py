"""Whether an answer is JSON."""

import json
from typing import NoReturn

from cl_bench.metrics.answers.answer import AnswerMetric


def json_validity(text: str, right: str, given: str) -> float:
    """1 where the answer, white space aside, is one JSON value (RFC 8259, so without NaN)."""
    try:
        json.loads(given, parse_constant=_refused)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def _refused(name: str) -> NoReturn:
    raise ValueError(name)


METRIC = AnswerMetric(json_validity)
