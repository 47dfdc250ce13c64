"""The board's cells: checked against their records, taken in by one door, run again."""

import gzip
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from boards import PROTOCOL, cell, make
from scipy import stats

from cl_bench.board import running
from cl_bench.board.blocks import board
from cl_bench.board.cells import (
    Record,
    as_row,
    read_cell,
    read_cells,
    record_scores,
    write_cell,
)
from cl_bench.board.command import main
from cl_bench.board.protocol import Method, protocols
from cl_bench.board.running import best_trial, take_in
from cl_bench.board.verifying import Check, interval, pick
from cl_bench.contracts import UsageError


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


def test_trials_are_run_under_the_order_that_is_for_choosing(tmp_path, runs, declared):
    method = Method("gpm", "gpm", choose={"batch_size": [10]})

    def take(trial):
        found = take_in(PROTOCOL, method, {"batch_size": 10}, runs, [trial], tmp_path / "cells")
        return [(t.seed, t.order, t.settings) for t in found.trials]

    for seed, order in ((0, 0), (1, 9)):
        with pytest.raises(UsageError, match=r"toy chooses with \(0, 9\)"):
            take(make(tmp_path / f"{seed}{order}", seed, order, 0.4))
    other = make(tmp_path / "other", 0, 9, 0.4, optimizer={"lr": 1})
    with pytest.raises(UsageError, match=r"optimizer\.lr is 1"):
        take(other)
    assert take(make(tmp_path / "own", 0, 9, 0.4)) == [(0, 9, {"batch_size": 10})]


def test_cells_elsewhere_stand_alone(kept):
    """Figures from before records were kept lie beside our own cells."""
    found = board(protocols(), kept)
    assert {e.cell for e in found} == {None}
    toy = replace(PROTOCOL, measured=({"file": "classics_digits"},))
    assert [e.cell is not None for e in board({"toy": toy}, kept)] == [True, False]


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
