"""Summaries of the accuracy matrix, a file each, whose name is the key in ``summary.json``.

Nobody lists them: whatever lies in this folder and has a ``SUMMARY`` is computed after every run,
and shown, compared and quoted in reports.
"""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from cl_bench.metrics.matrix import Matrix, so_far
from cl_bench.metrics.summaries.summary import Summary


@cache
def summaries() -> dict[str, Summary]:
    """All of them by key, in the order in which reports show them."""
    modules = {m.name: import_module(f"{__name__}.{m.name}") for m in iter_modules(__path__)}
    found = {key: module.SUMMARY for key, module in modules.items() if hasattr(module, "SUMMARY")}
    return dict(sorted(found.items(), key=lambda item: (item[1].place, item[0])))


def summarise(R: Matrix) -> dict[str, float]:
    """Every summary by key, in [-1, 1]; of a partial run, those of the tasks learned so far."""
    done = so_far(R)
    if done.shape[1] == 0:
        return dict.fromkeys(summaries(), float("nan"))
    return {key: summary.of(done) for key, summary in summaries().items()}
