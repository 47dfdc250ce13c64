"""Runs, cells and a protocol of a board that is nobody's."""

import json

from cl_bench.board.cells import Cell, Record
from cl_bench.board.protocol import Method, Orders, Protocol
from cl_bench.report.trials import read_trial
from cl_bench.tracking import open_record

NAMES = ["one", "two"]
ORDERS = Orders("stream.order_seed", (0, 1), 9)
PROTOCOL = Protocol(
    "toy", "Toy", "two tasks", 1, ["+strategy={strategy}", "+stream=split_digits"], (0, 1),
    {"gpm": Method("gpm", "gpm", {"batch_size": 10}), "finetune": Method("finetune", "finetune")},
    ORDERS,
)  # fmt: skip


def make(folder, seed, order, end, status="completed", **settings):
    config = {"seed": seed, "batch_size": 10, "stream": {"order_seed": order}, **settings}
    facts = {"stream": "split_digits", "strategy": "gpm", "seed": seed}
    with open_record(folder, NAMES, task_id_known=False, facts=facts, config=json.dumps(config),
                     command="python -m cl_bench x") as record:  # fmt: skip
        record.row(0, None, dict.fromkeys(NAMES, 0.1), 0.1)
        record.row(1, 0, {"one": 0.9, "two": 0.1}, 0.1)
        record.row(2, 1, {"one": end, "two": 0.9}, 0.1)
        record.finish(status, strategy_bytes=8, exemplars=0)
    return read_trial(folder, [])


def cell(method, accs, seeds=None, orders=(None,), reference=None, **more):
    seeds = range(len(accs) // len(orders)) if seeds is None else seeds
    pairs = [(seed, order) for order in orders for seed in seeds]
    costs = {"wall_seconds": more.pop("seconds", 1.0), "strategy_bytes": 0,
             "exemplars": more.pop("exemplars", 0)}  # fmt: skip
    runs = [Record(s, o, {"acc": a / 100, "bwt": 0.0}, costs)
            for (s, o), a in zip(pairs, accs, strict=True)]  # fmt: skip
    known = more.pop("known", False)
    return Cell("toy", method, "", "", "", known, {}, runs, reference=reference, **more)
