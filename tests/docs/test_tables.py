"""Every figure on a page is a row in docs/results, and both say the same."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def load():
    spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "docs/tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = load()
PAGES = {str(path.relative_to(ROOT)): path for path in tables.pages()}
RESULTS = {
    str(path.relative_to(tables.RESULTS).with_suffix("")): path
    for path in sorted(tables.RESULTS.rglob("*.json"))
    if "board" not in path.relative_to(tables.RESULTS).parts  # cells, which tests/board reads
}


@pytest.mark.parametrize("name", PAGES)
def test_a_pages_tables_are_those_of_the_data(name):
    page = PAGES[name].read_text()
    assert tables.filled(page) == page, "run python docs/tables.py"


@pytest.mark.parametrize("name", PAGES)
def test_no_page_has_a_table_of_results_of_its_own(name):
    page = tables.TABLE.sub("", PAGES[name].read_text())
    assert not re.findall(r"(?m)^\|.*(?:\d ± \d|\| [-+]?\d+\.\d+x? \|).*$", page)


@pytest.mark.parametrize("name", RESULTS)
def test_a_file_of_results_says_where_it_is_from(name):
    rows = list(tables.rows(name))
    assert rows
    for row in rows:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d(, \d{4}-\d\d-\d\d)*", row["date"] or "2026-11-24")
        if name.startswith("published/"):
            assert set(row["source"]) == {"paper", "table"}
            assert row["source"]["paper"]


@pytest.mark.parametrize("name", RESULTS)
def test_every_result_is_shown_on_a_page(name):
    """Published rows may be shown beside ours."""
    asked = [m[1] for path in PAGES.values() for m in tables.TABLE.finditer(path.read_text())]
    shown = {one for names in asked for one in names.partition(" where ")[0].split()}
    beside = {
        row["published"].rpartition("/")[0]
        for one in RESULTS
        for row in tables.rows(one)
        if "published" in row
    }
    quoted = {name for name in RESULTS if name.startswith("published/")}  # in conf/experiment
    assert name in shown | beside | quoted


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "conf/experiment").glob("*.yaml")))
def test_an_experiment_quotes_the_published_row(name):
    whole = yaml.safe_load((ROOT / f"conf/experiment/{name}.yaml").read_text())
    reference = whole.get("reference")
    if reference is None or "scenarios" in whole:  # several rows; a test of its own
        return
    published = [
        row
        for file in RESULTS
        if file.startswith("published/")
        for row in tables.rows(file)
        if row["id"] == name
    ]
    scores = {k: reference[k] for k in ("acc", "acc_std", "bwt", "bwt_std", "strategy", "seeds")}
    assert scores in [{k: row.get(k) for k in scores} for row in published]


@pytest.mark.parametrize("name", RESULTS)
def test_means_are_those_of_the_seeds(name):
    """As far as two decimals tell: they move a mean by 0.005, a deviation by 0.006."""
    for row in tables.rows(name):
        for score, values in row.get("per_seed", {}).items():
            assert len(values) == len(row["seeds"])
            assert np.mean(values) == pytest.approx(row[score], abs=0.0101)
            assert np.std(values, ddof=1) == pytest.approx(row[f"{score}_std"], abs=0.0111)


def test_a_page_that_differs_is_seen(tmp_path, monkeypatch):
    (tmp_path / "one.json").write_text(
        json.dumps(
            dict.fromkeys(tables.FIELDS)
            | {"values": [{"a": 1.25, "b": [1, 2]}, {"a": 2.0, "c": None}, {"b": []}]}
        )
    )
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    page = "<!-- table one where a\nx: {a:.1f} ({b}) || {a:.1f}\nc: {c}\n-->\n<!-- end -->\n"
    full = tables.filled(page)
    assert "| x | c |\n|---|---|\n| 1.2 (1, 2) |  |\n| 2.0 |  |\n" in full
    assert tables.filled(full) == full
    assert tables.filled(full.replace("2.0", "2.1")) == full
    only = page.replace("where a", "where a=2.0")
    assert "1.2" not in tables.filled(only)


def test_what_a_file_of_results_lacks_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "one.json").write_text('{"values": [], "command": null}')
    with pytest.raises(ValueError, match=r"one\.json: no commit, seeds, machine, date"):
        list(tables.rows("one"))


def test_a_published_row_brings_its_verdict():
    """Two published standard deviations, at least half a point."""
    gpm = next(row for row in tables.rows("pmnist") if row["strategy"] == "gpm")
    assert gpm["published_acc"] == 93.91
    assert gpm["verdict_acc"] == "inside"
    trgp = next(row for row in tables.rows("pmnist") if row["strategy"] == "trgp")
    assert trgp["verdict_acc"] == "above by 0.22"
    assert trgp["published_source"]["table"] == "Table 1"


@pytest.mark.parametrize(
    ("acc", "std", "ours", "naive", "verdict"),
    [
        (70.0, 1.0, [71.0, 70.0], [55.0, 56.0], "holds"),
        (70.0, 1.0, [73.0, 72.0], [55.0, 56.0], "missed: above by 0.50"),
        (70.0, 9.0, [74.0, 72.2], [55.0, 56.0], "missed: above by 0.10"),  # at most 3 points
        (56.0, 0.1, [55.9, 55.7], [56.0, 55.9], "missed: the gap has another sign"),
        (57.0, 0.1, [50.0, 51.0], [55.0, 56.0], "missed: BELOW by 6.00, the gap has another sign"),
        (55.4, 0.1, [50.0, 51.0], [55.0, 56.0], "not discriminating"),
        (60.0, 9.0, [50.0, 51.0], [52.0, 56.0], "missed: BELOW by 6.50, the gap has another sign"),
    ],
)
def test_a_row_is_held_against_the_naive_one_too(
    tmp_path, monkeypatch, acc, std, ours, naive, verdict
):
    """The published naive accuracy is 55."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    blank = dict.fromkeys(tables.FIELDS)
    theirs = [
        {"id": "bare", "acc": 55.0, "acc_std": 1.0},
        {"id": "rule", "acc": acc, "acc_std": std, "naive": "bare"},
    ]
    (tmp_path / "theirs.json").write_text(json.dumps(blank | {"values": theirs}))

    def row(name, scores, seeds):
        per_seed = {"per_seed": {"acc": scores}, "seeds": seeds}
        return {"published": f"theirs/{name}", "acc": sum(scores) / len(scores)} | per_seed

    whole = [row("bare", [*naive, 0.0], [0, 1, 9]), row("rule", ours, [0, 1])]
    (tmp_path / "ours.json").write_text(json.dumps(blank | {"values": whole}))
    bare, found = tables.rows("ours")
    assert "verdict" not in bare
    assert found["verdict"] == verdict
    assert found["gap"] == pytest.approx(sum(ours) / 2 - sum(naive) / 2)
    assert found["published_gap"] == pytest.approx(acc - 55.0)
