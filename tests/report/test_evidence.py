"""Intervals, effects and seeds beside the paired test; ranks over streams: published values."""

import csv
import io
import math

import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from studies import make_run

from cl_bench.report.compare import print_study, to_csv, to_markdown
from cl_bench.report.evidence import evidence, evidence_cells, needed, unbiased
from cl_bench.report.page import page_data
from cl_bench.report.ranks import Ranks, about, over_streams
from cl_bench.report.study import read_study

Q = (1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164)
"""Of Nemenyi's test at 5 % for 2 to 10 rows, as printed by Demšar (JMLR 7, 2006), table 5a."""


def test_the_critical_difference_is_that_of_the_paper():
    for k, q in enumerate(Q, start=2):
        ranks = Ranks("", False, ["s"] * 14, ["r"] * k, np.zeros((14, k)))
        assert ranks.critical == pytest.approx(q * math.sqrt(k * (k + 1) / (6 * 14)), rel=5e-4)


def test_ranks_and_friedmans_test_by_hand():
    scores = np.array([[0.9, 0.8, 0.7], [0.6, 0.6, 0.1], [0.5, 0.7, 0.3], [0.9, 0.2, 0.1]])
    ranks = Ranks("", False, list("wxyz"), ["a", "b", "c"], scores)
    np.testing.assert_allclose(ranks.ranks, [1.375, 1.625, 3.0])
    # 12 / (N k (k + 1)) sum (rank sums)^2 - 3 N (k + 1), over 1 - (t^3 - t) / (N (k^3 - k)), t = 2
    statistic = (12 / 48 * (5.5**2 + 6.5**2 + 12**2) - 48) / (1 - 6 / 96)
    assert ranks.p == pytest.approx(stats.chi2.sf(statistic, 2))
    shared = Ranks("", False, list("wxyz"), ["a", "b", "c"], np.ones((4, 3)))
    assert math.isnan(shared.p)
    assert "all ranks are shared" in about(shared)


@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15), (-0.5, 34)])
def test_so_many_pairs_as_tables_of_power_say(effect, pairs):
    assert needed(effect) == pairs


def test_what_no_number_of_seeds_shows():
    assert needed(0.0) is None
    assert needed(0.05) is None  # some 3,000 pairs


def test_the_factor_of_hedges():
    for freedom, wanted in ((2, 0.5642), (4, 0.7979), (10, 0.9228)):
        assert unbiased(freedom) == pytest.approx(wanted, abs=1e-3)
    sample = np.random.default_rng(0).normal(0.5, 1.0, (4000, 5))
    effects = sample.mean(1) / sample.std(1, ddof=1)
    assert effects.mean() > 0.56
    assert unbiased(4) * effects.mean() == pytest.approx(0.5, abs=0.03)


def test_of_few_pairs_the_interval_is_students():
    pairs = np.array([0.02, 0.05, 0.03])
    found = evidence(pairs)
    wanted = stats.ttest_1samp(pairs, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert found.effect == pytest.approx(0.5642 * pairs.mean() / pairs.std(ddof=1), rel=1e-3)


def test_the_bootstrap_holds_what_it_promises():
    draws = np.random.default_rng(1)
    hits = 0
    for _ in range(120):
        found = evidence(draws.normal(0.3, 0.1, 25))
        hits += found.low < 0.3 < found.high
    assert 0.87 < hits / 120 < 0.99
    pairs = draws.normal(0.0, 1.0, 8)
    one, moved = evidence(pairs), evidence(pairs + 3.0)
    assert one == evidence(pairs)
    assert pairs.min() < one.low < one.mean < one.high < pairs.max()
    assert (moved.low, moved.high) == pytest.approx((one.low + 3.0, one.high + 3.0), abs=0.01)


def test_equal_differences_are_no_effect():
    found = evidence(np.full(4, 0.25))
    assert (found.low, found.mean, found.high, found.seeds) == (0.25, 0.25, 0.25, None)
    assert math.isnan(found.effect)


STREAMS = ("digits", "faces", "texts")
LEVELS = {"gpm": 0.8, "ewc": 0.7, "er": 0.6, "joint": 0.95}
NOISE = {"gpm": (0.0, 0.01, 0.02), "ewc": (0.02, 0.0, 0.01), "er": (0.01, 0.02, 0.0)}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """gpm is better than ewc, and that than er, on three streams; not where the task id is told."""
    root = tmp_path_factory.mktemp("streams")
    for stream in STREAMS:
        for strategy, level in LEVELS.items():
            bound = {"bound": "upper"} if strategy == "joint" else {}
            facts = {"stream": stream, **bound}
            for seed, more in enumerate(NOISE.get(strategy, (0.0,))):
                where = root / stream / f"{strategy}{seed}"
                make_run(where, strategy, seed, [level + more] * 3, facts=facts)
    for strategy, level in (("ewc", 0.9), ("gpm", 0.1), ("er", 0.1)):
        make_run(root / "told" / strategy, strategy, 0, [level] * 3, known=True)
    return read_study([root])


def test_streams_count_once_bounds_do_not_and_nothing_is_ranked_across_the_task_id(study):
    (ranks,) = over_streams(study)
    assert ranks.streams == list(STREAMS)
    assert ranks.labels == ["gpm", "ewc", "er"]
    np.testing.assert_allclose(ranks.ranks, [1, 2, 3])
    np.testing.assert_allclose(ranks.scores, [[0.81, 0.71, 0.61]] * 3)
    assert ranks.p == pytest.approx(stats.chi2.sf(6, 2))  # 12 N / (k (k + 1)) sum (R - 2)^2 = 6


def test_they_are_shown_everywhere(study):
    block = next(b for b in study.blocks if b.stream == "digits" and not b.task_id_known)
    header, (ewc, er) = evidence_cells(block)
    assert header[0] == "against gpm"
    assert ewc[:3] == ["ewc", "3", "-10.0"]
    assert er[0] == "er"
    console = Console(width=140)
    with console.capture() as capture:
        print_study(study, console)
    said = capture.get()
    for part in ("against gpm", "mean rank", "Nemenyi's critical difference at 5 %", "Hedges' g"):
        assert part in said
    text = to_markdown(study)
    assert "| against gpm | n |" in text
    assert "| strategy | mean rank | digits | faces | texts |" in text
    rows = list(csv.DictReader(io.StringIO(to_csv(study))))
    mine = {r["strategy"]: r for r in rows if r["stream"] == "faces"}
    line = mine["ewc"]
    low, high = float(line["acc_difference_low"]), float(line["acc_difference_high"])
    assert float(line["acc_difference"]) == pytest.approx(-0.1)
    assert low < -0.1 < high
    assert float(line["acc_difference_seeds_needed"]) >= 2
    assert mine["gpm"]["acc_difference"] == mine["joint"]["acc_difference"] == ""
    made = page_data(study, [])
    assert [one["card"] for one in made["together"]] == ["Mean ranks"]
    assert made["together"][0]["rows"][0][:2] == ["gpm", "1.00"]
    shown = {b["title"]: b["evidence"] for b in made["blocks"]}
    assert shown["faces"]["rows"][0][0] == "ewc"
