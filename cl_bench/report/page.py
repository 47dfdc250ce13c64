"""The page of a study: one HTML file that needs no network.

What it shows is collected here as plain data; ``assets/page.js`` draws it with plotly.js (MIT, the
cartesian bundle, vendored from npm's ``plotly.js-cartesian-dist-min`` with its licence).
"""

import datetime
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from cl_bench.metrics import Matrix, forgetting_per_task, summaries
from cl_bench.report.compare import FLAG, p_value, remarks, spread
from cl_bench.report.escape import script, shown
from cl_bench.report.latex import KNOWN
from cl_bench.report.orders import Orders, about, order_cells, over_orders
from cl_bench.report.quantities import COSTS, METRICS, MORE, format_cost
from cl_bench.report.rows import Block, Row
from cl_bench.report.study import Study, differences
from cl_bench.report.trials import Trial
from cl_bench.version import VERSION

TOLD = "the same runs scored with the task id told; never to be compared with ACC"
INTRANSIGENCE = "how much less was learned than by joint training: LA of joint minus LA"


def render_page(study: Study, paths: Iterable[Path | str]) -> str:
    """The whole page.

    Args:
        study: what it shows.
        paths: where its runs are, for the reader.
    """
    found = files("cl_bench.report") / "assets"

    def asset(name: str) -> str:
        return (found / name).read_text(encoding="utf-8")

    parts = {
        "CSS": asset("page.css"),
        "PLOTLY": asset("plotly-cartesian.min.js"),
        "DATA": script(page_data(study, paths)),
        "JS": asset("page.js"),
    }
    # All places at once: what is put into one may look like another.
    return re.sub(r"/\*([A-Z]+)\*/", lambda place: parts[place[1]], asset("page.html"))


def page_data(study: Study, paths: Iterable[Path | str]) -> dict[str, Any]:
    """Everything on the page, as JSON takes it; scores in percent."""
    explanations = {key: summary.meaning for key, summary in summaries().items()}
    explanations["intransigence"] = INTRANSIGENCE
    explanations["task_aware_acc"] = TOLD
    explanations |= {key: one.meaning for key, one in MORE.items()}
    runs = [trial for row in study.rows() for trial in row.trials]
    return {
        "version": VERSION,
        "made": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        "paths": [shown(str(p)) for p in paths],
        "runs": len(runs),
        "metrics": [
            {"key": k, "name": n, "better": sign, "meaning": explanations[k]}
            for k, (n, sign) in METRICS.items()
        ],
        "costs": [{"key": k, "name": n} for k, n in COSTS.items()],
        "blocks": [_block(block) for block in study.blocks],
        "orders": [_orders(orders) for orders in over_orders(study)],
        "left_out": study.left_out,
        "searches": [_search(trial) for trial in study.searches],
    }


def _block(block: Block) -> dict[str, Any]:
    differing = differences(block.rows)
    return {
        "title": block.title,
        "known": KNOWN[block.task_id_known],
        "tasks": block.task_names,
        "metrics": block.shown(),
        "rows": [_row(block, row) for row in block.rows],
        "tested": bool(block.comparisons),
        "remarks": remarks(block),
        "warnings": block.warnings(),
        "differences": [
            {"key": key, "values": [_said(v) for v in values]} for key, values in differing.items()
        ],
    }


def _orders(orders: Orders) -> dict[str, Any]:
    header, lines = order_cells(orders)
    return {
        "title": orders.title,
        "known": KNOWN[orders.task_id_known],
        "about": about(orders),
        "header": header,
        "rows": lines,
        "bounds": [bool(row.bound) for row in orders.rows],
    }


def _row(block: Block, row: Row) -> dict[str, Any]:
    R = 100 * row.matrices
    forgotten = np.stack([forgetting_per_task(matrix) for matrix in R])
    T = R.shape[2]
    seen = np.stack([[matrix[i, :i].mean() for i in range(1, T + 1)] for matrix in R])
    return {
        "label": row.label,
        "aside": f"{row.bound} bound" if row.bound else "",
        "flag": FLAG if row.selection else "",
        "bound": row.bound,
        "n": row.n,
        "seeds": row.seeds,
        "values": {
            m: {
                "mean": _number(100 * row.mean(m)),
                "std": _number(100 * row.std(m)),
                "text": spread(row, m, 1, m in ("bwt", "fwt")),
                "best": block.best(m) is row,
            }
            for m in block.shown()
        },
        "p": p_value(block, row),
        "matrix": _spread(R)["mean"],
        "matrix_std": _spread(R)["std"],
        "confusion": _confusion(row),
        "general": _general(row),
        "seen": _spread(seen),
        "forgetting": _spread(forgotten),
        "layers": _layers(row, T),
        "costs": {
            k: {"value": _number(row.cost(k)), "text": format_cost(k, row.cost(k))} for k in COSTS
        },
        "reference": _reference(row),
        "command": row.trials[0].command,
    }


def _confusion(row: Row) -> list[Any] | None:
    """How tasks are taken for one another at the end, in percent; None where a run does not say."""
    found = [trial.run.confusion for trial in row.trials]
    told = [100 * matrix for matrix in found if matrix is not None]
    if len(told) < len(found) or len({m.shape for m in told}) != 1:
        return None
    return _numbers(np.mean(told, axis=0))


def _general(row: Row) -> dict[str, Any] | None:
    """Scores on tasks that the stream does not teach, in percent, mean over seeds that have them.

    The last row is the change from the first to the last one.
    """
    told = [trial.run.general for trial in row.trials if trial.run.general]
    if not told:
        return None
    names = list(dict.fromkeys(name for rows in told for one in rows.values() for name in one))
    learned = sorted(set.intersection(*(set(rows) for rows in told)))
    if not learned:
        return None
    scores = np.array(
        [[[rows[i].get(n) for n in names] for i in learned] for rows in told], dtype=float
    )
    mean = 100 * scores.mean(0)
    return {
        "tasks": names,
        "learned": [*map(str, learned), "change"],
        "scores": [_numbers(one) for one in [*mean, mean[-1] - mean[0]]],
    }


def _layers(row: Row, tasks: int) -> dict[str, dict[str, Any]]:
    """``{quantity: {layer: {"mean": [per task], "std": [...]}}}``."""
    found: dict[str, dict[str, Matrix]] = {}
    for k, trial in enumerate(row.trials):
        for line in trial.layers():
            for quantity, value in line.items():
                if quantity in ("task", "layer") or not value:
                    continue
                try:
                    number = float(value)
                except ValueError:
                    continue
                cells = found.setdefault(quantity, {}).setdefault(
                    line["layer"], np.full((row.n, tasks), math.nan)
                )
                cells[k, int(line["task"])] = number
    return {q: {name: _spread(v) for name, v in layers.items()} for q, layers in found.items()}


def _reference(row: Row) -> dict[str, Any] | None:
    if row.reference is None:
        return None
    found = dict(row.reference)
    return {
        "source": str(found.get("source", "")),
        "metrics": {
            m: {"mean": float(found[m]), "std": _finite(found.get(f"{m}_std"))}
            for m in METRICS
            if _finite(found.get(m)) is not None
        },
        "seeds": _finite(found.get("seeds")),
    }


def _search(trial: Trial) -> dict[str, Any]:
    return {
        "strategy": trial.strategy,
        "stream": trial.stream,
        "acc": _number(100 * trial.metrics["acc"]),
        "directory": shown(str(trial.run.directory)),
    }


def _spread(values: Matrix) -> dict[str, Any]:
    """Mean and standard deviation over the first axis; None where nothing was measured."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of empty slices
        mean = np.nanmean(values, axis=0)
        std = np.nanstd(values, axis=0, ddof=1) if len(values) > 1 else np.full_like(mean, np.nan)
    return {"mean": _numbers(mean), "std": _numbers(std)}


def _numbers(values: Matrix) -> list[Any]:
    if values.ndim > 1:
        return [_numbers(v) for v in values]
    return [_number(v) for v in values]


def _number(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _finite(value: Any) -> float | int | None:
    """A number as it is; None for anything else."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _said(value: Any) -> str:
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        return json.dumps(value)
    return "null" if value is None else str(value)
