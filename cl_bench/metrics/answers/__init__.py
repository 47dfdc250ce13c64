"""Metrics of one sample's answer, a file each, whose name is the metric's.

Nobody lists them: whatever lies in this folder and has a ``METRIC`` can be named. A function of
your own takes (prompt's text, right answer, given answer) and gives a score in [0, 1].
"""

import functools
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules

from cl_bench.contracts.options import known
from cl_bench.errors import UsageError
from cl_bench.metrics.answers.answer import AnswerMetric, normalised

__all__ = ["AnswerMetric", "answer_metrics", "metric_named", "normalised"]


@functools.cache
def answer_metrics() -> dict[str, AnswerMetric]:
    """All of them by name."""
    modules = {m.name: import_module(f"{__name__}.{m.name}") for m in iter_modules(__path__)}
    return {name: m.METRIC for name, m in sorted(modules.items()) if hasattr(m, "METRIC")}


def metric_named(metric: str | Callable[..., float], where: str) -> tuple[str, AnswerMetric]:
    """A metric and what it is called.

    Args:
        metric: a name, or a function of (prompt's text, right answer, given answer).
        where: says the metric, in messages: ``stream.metric``.

    Raises:
        UsageError: there is no metric of that name, its package is missing, or it is no function.
    """
    if not isinstance(metric, str):
        if not callable(metric):
            raise UsageError(
                f"{where}={metric}: name one of {', '.join(answer_metrics())}, or a function of "
                "yours, {_target_: module.function, _partial_: true}"
            )
        inner = metric.func if isinstance(metric, functools.partial) else metric
        return getattr(inner, "__name__", type(inner).__name__), AnswerMetric(metric)
    found = answer_metrics().get(metric)
    if found is None:
        raise UsageError(
            f"{where}={metric}: there is no such metric.{known(metric, list(answer_metrics()))} "
            f"There are {', '.join(answer_metrics())}; a function of yours is {{_target_: "
            "module.function, _partial_: true}"
        )
    if found.require is not None:
        found.require()
    return metric, found
