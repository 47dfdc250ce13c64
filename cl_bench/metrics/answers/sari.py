"""SARI, of simplifications."""

from typing import Any

from cl_bench.metrics.answers.answer import AnswerMetric, needed


def _package() -> Any:
    where = "git+https://github.com/feralvam/easse"
    return needed("easse.sari", "sari", f"{where} (or leave its task out: stream.tasks=[...])")


def sari(text: str, right: str, given: str) -> float:
    """SARI of one simplification (package easse, which is on GitHub only)."""
    if not given.strip():
        return 0.0
    score: float = _package().corpus_sari([text], [given], [[right]]) / 100
    return score


METRIC = AnswerMetric(sari, require=_package)
