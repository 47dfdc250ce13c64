"""ROUGE-L."""

from functools import cache
from typing import Any

from cl_bench.metrics.answers.answer import AnswerMetric, needed


@cache
def _package() -> Any:
    return needed("torchmetrics.functional.text", "rouge_l", "torchmetrics").rouge_score


def rouge_l(text: str, right: str, given: str) -> float:
    """F-measure of the longest common subsequence of words (package torchmetrics).

    TRACE uses another package, which splits words a little differently.
    """
    score: float = _package()(given, right, rouge_keys="rougeL")["rougeL_fmeasure"].item()
    return score


METRIC = AnswerMetric(rouge_l, require=_package)
