"""Summaries of a run, a file each, whose name is the key in ``summary.json``.

Nobody lists them: whatever lies in this folder and has a ``SUMMARY`` (of the accuracy matrix) or a
``FURTHER`` (of more, where a run has it) is computed after every run, and shown, compared and
quoted in reports. R is the accuracy matrix of :mod:`cl_bench.metrics.matrix`; tasks count from 1 in
formulas.

"By task" every task weighs alike, "by sample" every test sample does: tables of RanPAC weigh task
groups alike, PILOT's and iCaRL's are over all samples of the classes seen. The two differ where
tasks have test sets of different sizes, as in B50.
"""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from cl_bench.metrics.matrix import Matrix, so_far
from cl_bench.metrics.summaries.summary import Evidence, Further, Summary


@cache
def summaries() -> dict[str, Summary]:
    """Those of the matrix by key, in the order in which reports show them."""
    return _files("SUMMARY")


@cache
def further_summaries() -> dict[str, Further]:
    """Those of more than the matrix, likewise."""
    return _files("FURTHER")


def _files(name: str) -> dict[str, Any]:
    modules = {m.name: import_module(f"{__name__}.{m.name}") for m in iter_modules(__path__)}
    found = {key: getattr(module, name) for key, module in modules.items() if hasattr(module, name)}
    return dict(sorted(found.items(), key=lambda item: (item[1].place, item[0])))


def summarise(R: Matrix) -> dict[str, float]:
    """Every summary by key, in [-1, 1]; of a partial run, those of the tasks learned so far."""
    done = so_far(R)
    if done.shape[1] == 0:
        return dict.fromkeys(summaries(), float("nan"))
    return {key: summary.of(done) for key, summary in summaries().items()}


def summarise_further(evidence: Evidence) -> dict[str, float]:
    """Every further summary that the evidence is enough for, by key."""
    found = {key: one.of(evidence) for key, one in further_summaries().items()}
    return {key: value for key, value in found.items() if value is not None}
