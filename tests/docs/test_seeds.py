"""The list of published systems: each once, with a place that is there or a reason."""

import csv
import re
from collections import Counter
from pathlib import Path

from cl_bench.merging.choice import RULES

ROOT = Path(__file__).resolve().parents[2]


def lines():
    with (ROOT / "docs/seeds.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_system_is_there_once_with_a_place_or_a_reason():
    found = lines()
    assert [int(line["number"]) for line in found] == list(range(1, 231))
    assert not [title for title, n in Counter(line["title"] for line in found).items() if n > 1]
    for line in found:
        assert line["status"] in ("built", "library", "declined"), line
        assert line["remark"], line
        assert bool(line["where"]) == (line["status"] != "declined"), line


def test_what_is_built_is_where_the_list_says():
    for line in lines():
        if line["status"] in ("built", "library"):
            assert (ROOT / line["where"]).is_file(), line


def test_the_adapters_and_rules_that_remarks_name_are_there():
    named = []
    for line in lines():
        if line["status"] == "declined":
            continue
        for kind, names in re.findall(r"\b(adapter|rule)s? (\w+(?: and \w+)*)", line["remark"]):
            named += [(kind, name) for name in names.split(" and ")]
    assert {("adapter", "spectral_rotational"), ("rule", "iso_cts")} <= {*named}
    for kind, name in named:
        known = name in RULES if kind == "rule" else (ROOT / f"conf/adapter/{name}.yaml").is_file()
        assert known, (kind, name)


def test_what_a_library_gives_names_no_rule_of_ours():
    for line in lines():
        if line["status"] == "library" and line["where"].startswith("conf/optimizer"):
            text = (ROOT / line["where"]).read_text()
            assert "pytorch_optimizer." in text or "torch.optim." in text, line
