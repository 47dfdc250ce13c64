"""Verdicts, blocks, protocols, and figures from before records were kept."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from boards import PROTOCOL, cell
from rich.console import Console
from scipy import stats

from cl_bench.board.blocks import Entry, blocks, board, counts, fronts, results_directory
from cl_bench.board.command import print_board
from cl_bench.board.measured import measured_cells
from cl_bench.board.protocol import Method, protocols
from cl_bench.board.running import declared_settings
from cl_bench.board.verdict import find, separation
from cl_bench.contracts import UsageError

# --- verdicts -------------------------------------------------------------------------------------


def test_few_seeds_are_told_apart_by_students_interval():
    found = separation(cell("a", [80, 82, 85]), cell("finetune", [70, 74, 72]))
    gaps = np.array([10.0, 8.0, 13.0])
    low, high = stats.t.interval(0.95, 2, gaps.mean(), gaps.std(ddof=1) / math.sqrt(3))
    assert (found.n, found.mean) == (3, pytest.approx(gaps.mean()))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert found.told
    few = separation(cell("a", [80, 82]), cell("finetune", [70, 74]))
    assert math.isnan(few.low)
    assert not few.told


def test_from_five_seeds_on_seeds_and_orders_are_resampled_whole():
    orders = (0, 1, 2)
    # One order turns the difference around: 15 pairs look many, and the orders are three.
    gaps = np.repeat([12.0, 10.0, -9.0], 5) + np.tile(np.linspace(-0.1, 0.1, 5), 3)
    base = cell("finetune", [50.0] * 15, orders=orders)
    found = separation(cell("a", 50 + gaps, orders=orders), base)
    assert found.low < -8.5
    assert not found.told
    steady = np.repeat([12.0, 10.0, 9.0], 5) + np.tile(np.linspace(-1, 1, 5), 3)
    told = separation(cell("a", 50 + steady, orders=orders), base)
    assert told.told
    assert 8.5 < told.low < told.mean < told.high < 13
    assert told == separation(cell("a", 50 + steady, orders=orders), base)


BAND = {"acc": 80.0, "acc_std": 0.5, "source": "a paper"}


@pytest.mark.parametrize(("accs", "reference", "naive", "said"), [
    ([80, 80.2, 79.9], BAND, [60, 61, 62], "reached: inside"),
    ([82, 82.2, 81.9], BAND, [60, 61, 62], "reached: above by 1.03"),
    ([75, 75.2, 74.9], BAND, [60, 61, 62], "missed: BELOW by 3.97"),
    ([80, 80.2, 79.9], BAND, [79.5, 79.6, 79.9], "finetune reaches the band, too: it does not"),
    ([92, 92.2, 91.9], BAND, [88.5, 88.6, 88.9], "finetune reaches the band, too: it does not"),
    ([75, 75.2], BAND, [60, 61], "no verdict: 2 runs in common with finetune"),
    ([80.4, 79.6, 80], BAND, [90, 60, 82], "inside, but not told from finetune"),
    ([80, 80.2], BAND, [60, 61], "no verdict: 2 runs in common with finetune"),
    ([80, 80.2, 79.9], BAND, None, "no verdict: finetune was not run"),
    ([80, 80.2, 79.9], None, [60, 61, 62], "told from finetune"),
    ([80, 80.2, 79.9], None, [79, 82, 80], "not told from finetune"),
    ([50, 50.2, 49.9], None, [60, 61, 62], "worse than finetune"),
])  # fmt: skip
def test_a_verdict_needs_band_and_separation(accs, reference, naive, said):
    finetune = None if naive is None else cell("finetune", naive)
    found = find(cell("a", accs, reference=reference), finetune)
    assert said in found.text
    misses = naive is not None and reference is not None and np.mean(naive) < 80 - 2 * 0.5
    assert found.discriminates == misses


# --- the board ------------------------------------------------------------------------------------


def entries(cells):
    base = next((c for c in cells if c.method == "finetune"), None)
    methods = [*(c.method for c in cells), "hat"]
    protocol = replace(PROTOCOL, methods={m: Method(m, m) for m in methods})
    return [
        Entry(protocol, protocol.methods[m], c, find(c, base) if c else None)
        for m, c in zip(methods, [*cells, None], strict=True)
    ]


def test_what_knows_more_is_told_from_finetuning_that_knows_as_much():
    naive = cell("finetune_task", [94, 95, 96], known=True)
    methods = {n: Method(n, s, naive=b) for n, s, b in (
        ("finetune", "finetune", "finetune"), ("hat", "hat", "finetune_task"),
        ("finetune_task", "finetune", "finetune_task"))}  # fmt: skip
    protocol = replace(PROTOCOL, methods=methods)
    assert protocol.naives == {"finetune", "finetune_task"}
    found = find(cell("hat", [95, 95.1, 94.9], known=True), naive)
    assert found.text == "not told from finetune_task"
    assert find(naive, naive).text == "the lower bound"
    assert Entry(protocol, methods["finetune_task"], naive, None).bound == "lower"
    assert Entry(protocol, methods["hat"], None, None).bound is None


def test_blocks_are_what_methods_were_given_and_bounds_are_in_each_of_their_kind():
    cells = [cell("finetune", [20, 21, 22]), cell("joint", [90, 91, 92]),
             cell("gpm", [70, 71, 72], seconds=3.0), cell("ewc", [60, 61, 62], seconds=5.0),
             cell("er", [80, 81, 82], exemplars=200),
             cell("packnet", [95, 96, 97], known=True)]  # fmt: skip
    found = blocks(entries(cells))
    names = {title: [e.method.name for e in rows] for title, rows in found.items()}
    assert names == {
        "nothing but the stream": ["joint", "gpm", "ewc", "finetune"],
        "old samples kept": ["joint", "er", "finetune"],
        "task id known at test time": ["packnet"],
    }
    own = [e for e in found["nothing but the stream"] if not e.bound]
    assert fronts(own, "wall_seconds") == {"gpm"}
    # A lower bound is told from nothing: it has no verdict.
    assert counts(entries(cells)) == {"places": 7, "run": 6, "verdicts": 5, "bands": 0}
    console = Console(file=io.StringIO(), width=120)
    print_board(entries(cells), console)
    assert "not run: hat" in console.file.getvalue()
    assert "6 of 7 cells, 5 with a verdict" in console.file.getvalue()


def test_the_protocols_are_whole_and_their_commands_can_be_composed():
    known = protocols()
    assert [p.place for p in known.values()] == list(range(1, len(known) + 1))
    assert next(iter(known.values())).headline
    assert next(iter(known.values())).runs == 15
    digits = known["digits"]
    found = declared_settings(digits, digits.methods["gpm"], digits.methods["gpm"].trials()[3], 0)
    assert (found["optimizer.lr"], found["strategy.threshold"]) == (0.05, 0.95)
    rotated = known["rotated_mnist"]
    found = declared_settings(rotated, rotated.methods["er"], {}, 2)
    assert found["stream.order_seed"] == 2  # every seed has angles of its own
    assert (found["reference.acc"], found["strategy.memory"]) == (88.91, 500)
    assert digits.search(digits.methods["gpm"], None)[-4:] == [
        "search.enabled=true", "search.tasks=3", "seed=0", "stream.order_seed=9",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", protocols())
def test_every_cell_of_a_protocol_can_be_composed(name):
    protocol = protocols()[name]
    for method in protocol.methods.values():
        for settings in method.trials() or [{}]:
            declared_settings(protocol, method, settings, 0)


@pytest.mark.parametrize(("text", "said"), [
    ("methods: {gpm: }", "no finetune"),
    ("trials: 2\nmethods: {finetune: {choose: {a: [1, 2]}}, gpm: {choose: {a: [1]}}}", "gpm has 1"),
    ("trials: 1\norders: {setting: s, values: [1], chosen_on: 1}\n"
     "methods: {finetune: {choose: {a: [1]}}}", "chosen_on"),
    ("methods: {finetune: , hat: {naive: finetune_task}}", "hat must be told from finetune_task"),
    ("methods: {finetune: , gpm: , hat: {naive: gpm}}", "hat must be told from gpm"),
    ("colour: red\nmethods: {finetune: }", "not a protocol"),
])  # fmt: skip
def test_a_protocol_that_is_not_fair_is_refused(tmp_path, text, said):
    (tmp_path / "board").mkdir()
    head = "title: t\nwhat: w\nplace: 1\ncommand: []\nseeds: [0]\n"
    (tmp_path / "board/p.yaml").write_text(head + text)
    with pytest.raises(UsageError, match=said):
        protocols(tmp_path)


def test_measured_figures_are_cells_where_they_carry_what_a_cell_needs():
    results = results_directory().parent
    known = protocols()
    found = {c.method: c for c in measured_cells(known["digits_defaults"], results)}
    whole = json.loads((results / "classics_digits.json").read_text())["values"]
    wanted = {row["strategy"] for row in whole if row["commit"]} & known[
        "digits_defaults"
    ].methods.keys()
    assert found.keys() == wanted
    assert not found["gpm"].kept
    assert found["hat"].task_id_known
    row = next(row for row in whole if row["strategy"] == "gpm")
    assert found["gpm"].values("acc") == pytest.approx(row["per_seed"]["acc"])
    scenario = {c.method: c for c in measured_cells(known["split_mnist_domain"], results)}
    assert scenario["er"].reference["acc"] == 95.16
    assert scenario["finetune_sgd"].reference["acc"] == 63.2  # "finetune, plain SGD" in the file
    # A mean over seeds without its values is no cell: nothing can be paired with it.
    pmnist = {c.method for c in measured_cells(known["pmnist"], results)}
    assert "sgp" not in pmnist


def test_the_cells_that_are_kept_are_what_their_records_say():
    found = board(protocols(), results_directory())
    assert [e for e in found if e.cell is not None and e.cell.kept], "none is kept"
    assert counts(found)["run"] > 40
