"""Scores of one generated answer, in [0, 1]; an empty answer scores 0."""

import importlib
import re
import string
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from cl_bench.contracts.errors import UsageError

PUNCTUATION = str.maketrans("", "", string.punctuation)

Metric = Callable[[str, str, str], float]
"""Score from the prompt's text, the right answer and the given one."""


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation, white space collapsed; articles stay.

    As O-LoRA's evaluation does it, which follows SQuAD's but for the articles.
    """
    return " ".join(text.lower().translate(PUNCTUATION).split())


def exact_match(text: str, right: str, given: str) -> float:
    """1 where both are equal once normalised."""
    found = normalised(given)
    return float(bool(found) and found == normalised(right))


def verbatim(text: str, right: str, given: str) -> float:
    """1 where both are equal but for white space around them: points, signs and case count.

    TRACE's own accuracy compares the strings as they are (its metrics.py).
    """
    return float(bool(given.strip()) and given.strip() == right.strip())


def first_letter(text: str, right: str, given: str) -> float:
    """1 where the first characters are equal: TRACE's ScienceQA, explanations left aside."""
    return float(given.strip()[:1] != "" and given.strip()[:1] == right.strip()[:1])


def rouge_l(text: str, right: str, given: str) -> float:
    """F-measure of the longest common subsequence of words (package torchmetrics).

    TRACE uses another package, which splits words a little differently.
    """
    score: float = _rouge()(given, right, rouge_keys="rougeL")["rougeL_fmeasure"].item()
    return score


LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)


def edit_similarity(text: str, right: str, given: str) -> float:
    """Normalised indel similarity of code (package rapidfuzz), literals in place of their tags."""
    if not given:
        return 0.0
    plain = [_with_literals(code) for code in (right, given)]
    score: float = (
        _needed("rapidfuzz.fuzz", "edit_similarity", "'cl_bench[language]'").ratio(*plain) / 100
    )
    return score


def sari(text: str, right: str, given: str) -> float:
    """SARI of one simplification (package easse, which is on GitHub only)."""
    if not given.strip():
        return 0.0
    score: float = _easse().corpus_sari([text], [given], [[right]]) / 100
    return score


METRICS: Mapping[str, Metric] = {
    "exact_match": exact_match,
    "verbatim": verbatim,
    "first_letter": first_letter,
    "rouge_l": rouge_l,
    "edit_similarity": edit_similarity,
    "sari": sari,
}


def require_packages(metrics: Iterable[str]) -> None:
    """Raise :class:`UsageError` if a metric's package is missing."""
    packages: Mapping[str, Callable[[], Any]] = {
        "rouge_l": _rouge,
        "edit_similarity": lambda: edit_similarity("", "a", "a"),
        "sari": _easse,
    }
    for metric in set(metrics) & set(packages):
        packages[metric]()


def _with_literals(code: str) -> str:
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    return LITERAL.sub(lambda match: match[1], code)


@cache
def _rouge() -> Any:
    return _needed("torchmetrics.functional.text", "rouge_l", "torchmetrics").rouge_score


def _easse() -> Any:
    where = "git+https://github.com/feralvam/easse"
    return _needed("easse.sari", "sari", f"{where} (or leave its task out: stream.tasks=[...])")


def _needed(module: str, metric: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"the metric {metric} needs a package that is not installed: pip install {package}"
        ) from error
