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
