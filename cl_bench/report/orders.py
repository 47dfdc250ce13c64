"""The same rows under several orders of the tasks: how much the order decides."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cl_bench.report.quantities import METRICS
from cl_bench.report.rows import Block, Row
from cl_bench.report.study import Study, of_data

ORDER = "stream.order_seed"

ABOUT = (
    "percent, mean ± standard deviation over orders (sample, n - 1) of each order's mean over "
    "seeds; worst: the order with the worst of them"
)


@dataclass(frozen=True)
class OrderRow:
    """One row of a study under several orders.

    Attributes:
        label: as in its blocks.
        rows: by the orders' seeds.
    """

    label: str
    rows: dict[int, Row]

    @property
    def bound(self) -> str | None:
        """As of its rows."""
        return next(iter(self.rows.values())).bound

    def per_order(self, metric: str) -> NDArray[np.float64]:
        """The mean over seeds, an entry per order, in [0, 1]."""
        return np.array([row.mean(metric) for row in self.rows.values()])

    def mean(self, metric: str) -> float:
        """Over orders."""
        return float(self.per_order(metric).mean())

    def std(self, metric: str) -> float:
        """Over orders, of the sample (n - 1)."""
        return float(self.per_order(metric).std(ddof=1))

    def worst(self, metric: str) -> float:
        """Of the orders."""
        sign = METRICS[metric][1]
        return float(sign * (sign * self.per_order(metric)).min())


@dataclass(frozen=True)
class Orders:
    """Rows that can be compared over the orders that all of them have.

    Attributes:
        title: of the stream, as of its blocks but for the order.
        task_id_known: at test time, for all of them.
        orders: their seeds.
        rows: bounds first and last, the others by mean ACC.
    """

    title: str
    task_id_known: bool
    orders: list[int]
    rows: list[OrderRow]

    @cached_property
    def metrics(self) -> list[str]:
        """Those that every row has under every order."""
        found = ("acc", "average_incremental_accuracy", "bwt", "forgetting")
        return [m for m in found if not any(math.isnan(row.mean(m)) for row in self.rows)]


def over_orders(study: Study) -> list[Orders]:
    """What the blocks of a study say together that differ in the order of tasks alone."""
    grouped: dict[tuple[object, ...], dict[int, Block]] = {}
    for block in study.blocks:
        settings = block.rows[0].trials[0].settings
        own = tuple((k, repr(v)) for k, v in sorted(settings.items()) if of_data(k) and k != ORDER)
        keeps = any(t.keeps_samples for row in block.rows for t in row.trials)
        order = settings.get(ORDER)
        if isinstance(order, int):
            key = (block.stream, len(block.task_names), own, block.task_id_known, keeps)
            grouped.setdefault(key, {})[order] = block
    found = (_together(blocks) for blocks in grouped.values() if len(blocks) > 1)
    return [orders for orders in found if orders is not None]


def _together(blocks: dict[int, Block]) -> Orders | None:
    orders = sorted(blocks)
    by_order = [{row.label: row for row in blocks[order].rows} for order in orders]
    common = [label for label in by_order[0] if all(label in rows for rows in by_order)]
    if not common:
        return None
    rows = [
        OrderRow(label, dict(zip(orders, (r[label] for r in by_order), strict=True)))
        for label in common
    ]
    place = {"lower": 0, None: 1, "upper": 2}
    rows.sort(key=lambda row: (place[row.bound], -row.mean("acc"), row.label))
    first = blocks[orders[0]]
    words = [w for w in first.title.split(" ") if not w.startswith("order_seed=")]
    # Another order may have other classes, of which the backbone has seen another share.
    title = re.sub(r"\(\d+ of \d+ classes in ([^)]+)\)", r"(trained on \1)", " ".join(words))
    return Orders(title, first.task_id_known, orders, rows)


def about(orders: Orders) -> str:
    """What the reader of a table over orders must know."""
    return f"orders {', '.join(map(str, orders.orders))}; {ABOUT}"


def order_cells(orders: Orders, digits: int = 1) -> tuple[list[str], Sequence[Sequence[str]]]:
    """Header and rows as text."""
    header = ["strategy"]
    for metric in orders.metrics:
        header += [METRICS[metric][0], f"worst {METRICS[metric][0]}"]
    lines = []
    for row in orders.rows:
        line = [f"{row.label} ({row.bound} bound)" if row.bound else row.label]
        for metric in orders.metrics:
            sign = "+" if metric == "bwt" else ""
            mean, std = 100 * row.mean(metric), 100 * row.std(metric)
            line.append(f"{mean:{sign}.{digits}f} ± {std:.{digits}f}")
            line.append(f"{100 * row.worst(metric):{sign}.{digits}f}")
        lines.append(line)
    return header, lines
