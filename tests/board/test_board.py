"""The board: protocols, cells that are checked against their records, verdicts, the one door."""

import gzip
import io
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from cl_bench.board import running
from cl_bench.board.blocks import Entry, blocks, board, counts, fronts, results_directory
from cl_bench.board.cells import (
    Cell,
    Record,
    as_row,
    read_cell,
    read_cells,
    record_scores,
    write_cell,
)
from cl_bench.board.command import main, print_board
from cl_bench.board.measured import measured_cells
from cl_bench.board.protocol import Method, Orders, Protocol, protocols
from cl_bench.board.running import best_trial, declared_settings, take_in
from cl_bench.board.verdict import find, separation
from cl_bench.board.verifying import Check, interval, pick
from cl_bench.contracts import UsageError
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


@pytest.fixture
def declared(monkeypatch):
    """What the protocol declares, without composing it."""
    own = {"seed": 0, "batch_size": 10, "stream.order_seed": 0}
    monkeypatch.setattr(running, "declared_settings", lambda *_: own)


@pytest.fixture
def runs(tmp_path):
    return [
        make(tmp_path / f"runs/{seed}-{order}", seed, order, 0.5 + 0.1 * seed + 0.01 * order)
        for seed in (0, 1)
        for order in (0, 1)
    ]


@pytest.fixture
def kept(tmp_path, runs, declared):
    take_in(PROTOCOL, PROTOCOL.methods["gpm"], {}, runs, [], tmp_path / "cells")
    return tmp_path / "cells"


# --- cells ----------------------------------------------------------------------------------------


def test_a_cell_is_its_records_in_the_protocols_order(kept, runs):
    (cell,) = read_cells(kept)
    assert [(run.seed, run.order) for run in cell.runs] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert cell.values("acc") == pytest.approx([70.0, 75.0, 70.5, 75.5])
    assert cell.kept
    run = cell.runs[1]
    packed = (kept / "toy" / run.file).read_bytes()
    assert gzip.decompress(packed) == (runs[2].run.directory / "results.jsonl").read_bytes()
    assert as_row(kept, cell, None).matrices[0] == pytest.approx(runs[0].run.matrix)
    before = {p: p.read_bytes() for p in kept.rglob("*.gz")}
    write_cell(
        kept, cell, {r.file: gzip.decompress(before[kept / "toy" / r.file]) for r in cell.runs}
    )
    assert {p: p.read_bytes() for p in kept.rglob("*.gz")} == before
    assert read_cells(kept) == [cell]


def test_a_cell_names_where_and_when_its_runs_ran(tmp_path, runs, declared):
    """Not where, and when, they were taken in; nor in which folders its data lay."""
    for trial, python in zip(runs, ("3.11.7", "3.12.1", "3.11.7", "3.11.7"), strict=True):
        told = {"python": python, "platform": "Linux-6", "cpu": "AVX2"}
        (trial.run.directory / "environment.json").write_text(json.dumps(told))
    said = "python -m cl_bench +stream=x 'stream.data_dir=/home/me/my data/mnist' 'a=[1, 2]'"
    runs[0] = replace(runs[0], command=said)
    runs[2] = replace(runs[2], run=replace(runs[2].run, started="2031-05-06T07:08:09.1+00:00"))
    found = take_in(PROTOCOL, PROTOCOL.methods["gpm"], {}, runs, [], tmp_path / "cells")
    assert found.machine == "Linux-6, AVX2, Python 3.11.7; Linux-6, AVX2, Python 3.12.1"
    assert found.date == "2031-05-06"
    told = "python -m cl_bench +stream=x stream.data_dir=/path/to/mnist 'a=[1, 2]'"
    assert found.runs[0].command == told


def test_what_a_cell_says_is_what_its_records_say(kept):
    path = kept / "toy/gpm.json"
    told = json.loads(path.read_text())
    told["runs"][0]["scores"]["acc"] += 0.01
    path.write_text(json.dumps(told))
    with pytest.raises(UsageError, match="the cell says"):
        read_cell(path)
    told["runs"][0]["scores"]["acc"] -= 0.01
    path.write_text(json.dumps(told))
    read_cell(path)
    record = kept / "toy" / told["runs"][0]["file"]
    content = gzip.decompress(record.read_bytes())
    for other in (gzip.compress(content.replace(b"0.9", b"0.8")), gzip.compress(content)[:-9], b""):
        record.write_bytes(other)
        with pytest.raises(UsageError, match=r"not the record|cannot be read"):
            read_cell(path)


def test_the_door_takes_what_is_declared_and_nothing_else(tmp_path, runs, declared):
    gpm = PROTOCOL.methods["gpm"]

    def take(given):
        return take_in(PROTOCOL, gpm, {}, given, [], tmp_path / "cells")

    with pytest.raises(UsageError, match=r"seed and order \(1, 1\) are missing"):
        take(runs[:3])
    with pytest.raises(UsageError, match="there twice"):
        take([*runs, make(tmp_path / "again", 0, 0, 0.5)])
    other = make(tmp_path / "other", 1, 1, 0.6, batch_size=20)
    with pytest.raises(UsageError, match="batch_size is 20, and toy/gpm declares 10"):
        take([*runs[:3], other])
    more = make(tmp_path / "more", 1, 1, 0.6, optimizer={"lr": 1})
    with pytest.raises(UsageError, match=r"optimizer\.lr is 1, .* declares not to be there"):
        take([*runs[:3], more])
    failed = make(tmp_path / "failed", 1, 1, 0.6, status="failed")
    with pytest.raises(UsageError, match="only completed runs"):
        take([*runs[:3], failed])
    assert not (tmp_path / "cells").exists()
    take(runs)


def test_a_band_is_the_protocols_and_not_a_runs_own(tmp_path, runs, declared, monkeypatch):
    own = {"acc": 1.0, "source": "nobody"}
    runs[0] = make(tmp_path / "own", 0, 0, 0.5, reference=own)
    gpm = PROTOCOL.methods["gpm"]
    assert take_in(PROTOCOL, gpm, {}, runs, [], tmp_path / "cells").reference is None
    settings = running.declared_settings(PROTOCOL, gpm, {}, 0)
    told = {**settings, "reference.acc": 72.0, "reference.source": "a paper"}
    monkeypatch.setattr(running, "declared_settings", lambda *_: told)
    kept = take_in(PROTOCOL, gpm, {}, runs, [], tmp_path / "cells")
    assert kept.reference == {"acc": 72.0, "source": "a paper"}


def test_what_only_seems_forgotten_is_part_of_a_cell():
    """The last look at alignment counts, over the old tasks whose drop was taken apart."""

    def look(inside, **values):
        told = {name: {"spurious_fraction": value} for name, value in values.items()}
        return {"event": "probe", "probe": "alignment", "inside": inside, "values": told}

    rows = [{"event": "evaluation", "row": k, "scores": {"one": a, "two": b}}
            for k, (a, b) in enumerate(((0.0, 0.0), (0.9, 0.0), (0.4, 0.8)))]  # fmt: skip

    def scores(*events):
        return record_scores("\n".join(map(json.dumps, (*rows, *events))).encode())

    assert scores()["bwt"] == pytest.approx(-0.5)
    assert "spurious_fraction" not in scores()
    early, last = look(False, one=0.1), look(False, one=0.75, zero=0.25, two=None)
    assert scores(early, last, look(True, one=0.3))["spurious_fraction"] == 0.5
    assert scores(look(False, one=None))["spurious_fraction"] is None


def test_of_trials_the_best_is_chosen_and_none_may_lack(tmp_path):
    method = Method("gpm", "gpm", choose={"batch_size": [10, 20], "strategy.t": [0.9]})
    trials = [make(tmp_path / str(b), 0, 9, end, batch_size=b, strategy={"t": 0.9})
              for b, end in ((10, 0.2), (20, 0.6))]  # fmt: skip
    assert best_trial(method, trials) == {"batch_size": 20, "strategy.t": 0.9}
    with pytest.raises(UsageError, match="is missing"):
        best_trial(method, trials[:1])


# --- verdicts -------------------------------------------------------------------------------------


def cell(method, accs, seeds=None, orders=(None,), reference=None, **more):
    seeds = range(len(accs) // len(orders)) if seeds is None else seeds
    pairs = [(seed, order) for order in orders for seed in seeds]
    costs = {"wall_seconds": more.pop("seconds", 1.0), "strategy_bytes": 0,
             "exemplars": more.pop("exemplars", 0)}  # fmt: skip
    runs = [Record(s, o, {"acc": a / 100, "bwt": 0.0}, costs)
            for (s, o), a in zip(pairs, accs, strict=True)]  # fmt: skip
    known = more.pop("known", False)
    return Cell("toy", method, "", "", "", known, {}, runs, reference=reference, **more)


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


def test_cells_elsewhere_stand_alone(kept):
    """Figures from before records were kept lie beside our own cells."""
    found = board(protocols(), kept)
    assert {e.cell for e in found} == {None}
    toy = replace(PROTOCOL, measured=({"file": "classics_digits"},))
    assert [e.cell is not None for e in board({"toy": toy}, kept)] == [True, False]


def test_the_cells_that_are_kept_are_what_their_records_say():
    found = board(protocols(), results_directory())
    assert [e for e in found if e.cell is not None and e.cell.kept], "none is kept"
    assert counts(found)["run"] > 40


# --- again ----------------------------------------------------------------------------------------


def test_the_interval_is_of_one_more_run():
    low, high = interval([70.0, 74.0, 72.0])
    half = stats.t.ppf(0.975, 2) * 2.0 * math.sqrt(4 / 3)
    assert (low, high) == (pytest.approx(72 - half), pytest.approx(72 + half))
    assert interval([70.0, 70.0, 70.0]) == (69.5, 70.5)


@pytest.mark.parametrize(("identical", "versions", "acc", "holds"), [
    (True, [], 99.0, True), (False, [], 70.0, False), (False, ["torch 1 -> 2"], 70.0, True),
    (False, ["torch 1 -> 2"], 75.0, False),
])  # fmt: skip
def test_the_same_bits_on_the_same_versions_or_else_within_the_interval(
    identical, versions, acc, holds
):
    assert Check("a", identical, versions, 69.0, 71.0, acc).holds == holds


def test_only_cells_with_records_are_picked():
    kept_run = Record(0, None, {"acc": 0.5}, file="a.gz")
    whole = replace(cell("a", [50]), runs=[kept_run])
    assert pick([cell("b", [50]), whole], random.Random(0)) == (whole, kept_run)
    with pytest.raises(UsageError, match="no cell with records"):
        pick([cell("b", [50])], random.Random(0))


@pytest.mark.parametrize(("words", "said"), [
    (["run", "nosuch"], "no such protocol"),
    (["run", "digits/nosuch"], "digits has no such method"),
    (["run", "--minutes", "5", "digits/nosuch"], "digits has no such method"),
    (["add", "digits"], "name one cell and its runs"),
])  # fmt: skip
def test_a_word_that_names_nothing_is_one_error(tmp_path, capsys, words, said):
    assert main([*words, "--results", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
    assert not list(Path(tmp_path).iterdir())
