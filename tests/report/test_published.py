"""Published numbers beside ours: bands, what is missed, what is judged."""

import math
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from studies import make_run

from cl_bench.report.__main__ import main
from cl_bench.report.compare import remarks
from cl_bench.report.published import judge
from cl_bench.report.quantities import METRICS
from cl_bench.report.study import read_study


@pytest.mark.parametrize(
    ("std", "ours", "text"),
    [
        (0.4, 72.0, "inside"),
        (0.4, 71.68, "inside"),
        (0.4, 71.38, "BELOW by 0.30"),
        (0.4, 73.58, "above by 0.30"),
        (0.1, 71.98, "inside"),  # the band is never narrower than half a point
        (0.1, 71.88, "BELOW by 0.10"),
        (None, 72.98, "inside"),
        (4.0, 69.48, "inside"),  # nor wider than three points
        (4.0, 69.38, "BELOW by 0.10"),
        (0.4, math.nan, "not measured"),
    ],
)
def test_the_band_around_a_published_number(std, ours, text):
    assert judge({"acc": 72.48, "acc_std": std}, "acc", ours).text == text


@pytest.mark.parametrize(
    ("key", "published", "ours", "text", "missed"),
    [
        ("acc", 90.0, 89.0, "BELOW by 0.50", True),
        ("acc", 90.0, 91.0, "above by 0.50", False),
        ("bwt", -1.75, -3.0, "BELOW by 0.75", True),
        ("forgetting", 1.75, 3.0, "ABOVE by 0.75", True),
        ("forgetting", 1.75, 0.25, "below by 1.00", False),
        ("forgetting", 1.75, 2.0, "inside", False),
    ],
)
def test_worse_is_what_the_measure_calls_worse(key, published, ours, text, missed):
    found = judge({key: published}, key, ours)
    assert (found.text, found.missed) == (text, missed)


def test_only_what_a_reference_names_is_judged(tmp_path, capsys):
    make_run(
        tmp_path / "fot",
        "fot",
        0,
        [0.7, 0.8, 0.9],
        settings={"reference": {"strategy": "fot", "forgetting": 1.75, "source": "theirs"}},
    )
    assert main([str(tmp_path), "--published"]) == 0
    out = capsys.readouterr().out
    table = out[out.index("published") :]
    assert re.search(r"fot +1 +forgetting +1\.75 +0\.50 +15\.00 +ABOVE by 12\.75", table)
    assert "nan" not in table
    assert "BWT" not in table


@pytest.mark.parametrize(
    "path", sorted(Path("conf/experiment").glob("*.yaml")), ids=lambda p: p.stem
)
def test_references_are_in_measures_that_there_are(path):
    reference = OmegaConf.load(path).get("reference") or {}
    facts = {"strategy", "seeds", "source"}
    measures = {str(k).removesuffix("_std") for k in reference} - facts
    assert measures <= METRICS.keys()
    assert bool(measures) == bool(reference)


def test_published_numbers_stand_beside_ours(tmp_path, capsys):
    reference = {"strategy": "gpm", "acc": 93.91, "acc_std": 0.16, "bwt": -3.0, "source": "CUBER"}
    for strategy in ("gpm", "er"):
        make_run(
            tmp_path / strategy, strategy, 0, [0.7, 0.8, 0.9], settings={"reference": reference}
        )
    assert main([str(tmp_path), "--published"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"93\.91 ± 0\.16 +0\.50", out)  # their spread, and what is tolerated
    assert "CUBER" in out
    assert "BELOW" in out
    assert "no reference" in out
    assert "nan" not in out  # of one seed there is no spread


def test_a_strategy_says_itself_that_it_is_a_bound(tmp_path):
    """Whatever it is called; runs older than that are known by name (the other tests')."""
    for name, last, bound in (
        ("all", [0.9, 0.9, 0.9], "upper"),
        ("none", [0.1, 0.2, 0.8], "lower"),
    ):
        make_run(tmp_path / name, name, 0, last, facts={"bound": bound})
    make_run(tmp_path / "gpm", "gpm", 0, [0.5, 0.6, 0.7])
    (block,) = read_study([tmp_path]).blocks
    assert [(row.label, row.bound) for row in block.rows] == [
        ("none", "lower"),
        ("gpm", None),
        ("all", "upper"),
    ]
    assert remarks(block)[0] == "none is the lower bound; all is the upper bound"
    # Diagonals 0.9, 0.9 and 0.9 of the upper bound, less 0.9, 0.9 and 0.7.
    assert block.rows[1].mean("intransigence") == pytest.approx(0.2 / 3)
