"""Rows under several orders of the tasks, against numbers by hand."""

import numpy as np
import pytest
from rich.console import Console
from studies import make_run

from cl_bench.report.compare import print_study, to_markdown
from cl_bench.report.orders import over_orders
from cl_bench.report.page import page_data
from cl_bench.report.study import read_study

LAST = {  # the last row, by strategy and order; every seed adds .02
    ("gpm", 0): (0.6, 0.8, 0.9),
    ("gpm", 5): (0.7, 0.8, 0.9),
    ("ewc", 0): (0.3, 0.5, 0.8),
    ("ewc", 5): (0.1, 0.5, 0.8),
}


def stream(order, tasks=3):
    return {
        "stream": {
            "_target_": "cl_bench.tasks.s",
            "num_tasks": tasks,
            "task_id_at_test": False,
            "order_seed": order,
        }
    }


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("orders")
    for (strategy, order), last in LAST.items():
        for seed in (0, 1):
            scores = [x + 0.02 * seed for x in last]
            where = root / f"{strategy}-{order}-{seed}"
            make_run(where, strategy, seed, scores, settings=stream(order))
    make_run(root / "er", "er", 0, (0.5, 0.5, 0.5), settings=stream(0))  # in one order alone
    make_run(root / "other", "gpm", 0, (0.9, 0.9, 0.9), settings=stream(5, tasks=4))
    return read_study([root])


def test_orders_weigh_alike_and_the_worst_is_named(study):
    (orders,) = over_orders(study)
    assert orders.orders == [0, 5]
    assert [row.label for row in orders.rows] == ["gpm", "ewc"]
    gpm, ewc = orders.rows
    means = np.array([2.3 / 3 + 0.01, 2.4 / 3 + 0.01])
    np.testing.assert_allclose(gpm.per_order("acc"), means)
    assert gpm.mean("acc") == pytest.approx(means.mean())
    assert gpm.std("acc") == pytest.approx(means.std(ddof=1))
    assert ewc.worst("acc") == pytest.approx(1.4 / 3 + 0.01)
    assert ewc.worst("forgetting") == pytest.approx(max(ewc.per_order("forgetting")))


def test_they_are_shown_everywhere(study):
    console = Console(width=140)
    with console.capture() as capture:
        print_study(study, console)
    said = capture.get()
    assert "over orders  task id not known at test time" in said
    line = next(x for x in said.partition("over orders")[2].splitlines() if x.startswith("ewc"))
    assert line.split()[1:5] == ["51.0", "±", "4.7", "47.7"]
    assert "over orders" in to_markdown(study)
    (shown,) = page_data(study, [])["together"]
    assert shown["rows"][0][0] == "gpm"
    assert shown["header"][:3] == ["strategy", "ACC", "worst ACC"]


def test_one_order_is_none(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / str(seed), "gpm", seed, (0.5, 0.5, 0.5), settings=stream(0))
    assert over_orders(read_study([tmp_path])) == []
