"""Text from runs is shown by every format of a report, and obeyed by none."""

import csv
import html
import io
import json
import re

import pytest

from cl_bench.report.__main__ import main
from cl_bench.report.card import model_card
from cl_bench.report.escape import csv_cell, latex, markdown, script
from cl_bench.tracking import open_record

TASK = "<!--<script>alert(1)</script>"
NAMES = {
    "formula": "=cmd|' /C calc'!A0",
    "latex": r"\input{/etc/passwd}$x^2$ ~ 50 % & [a]",
    "markdown": "a|b](x) [click](javascript:alert(1)) <img src=x onerror=alert(1)>",
    "terminal": "\x1b]0;owned\x07\x1b[2Jgpm",
    "markup": "[red]x[/red] [link=file:///etc]y[/link]",
    "page": "/*JS*/ </script><script>alert(1)</script>",
}


def run_named(directory, name):
    with open_record(
        directory,
        [TASK, name],
        task_id_known=True,
        command=f"python -m cl_bench # /*JS*/ {name}",
        config=f"strategy:\n  note: {json.dumps(name)}\n",
        data={
            "modality": "image",
            "scenario": "domain",
            "fingerprint": name,
            "tasks": [
                {"name": n, "classes": 2, "metric": name, "head": 0, "first_class": 0}
                | {"source": name, "licence": name, "citation": name}
                for n in (TASK, name)
            ],
        },
        facts={"stream": name, "strategy": name, "seed": 0},
    ) as record:
        for row in range(3):
            record.row(row, row - 1 if row else None, {TASK: 0.5, name: 0.25 * row}, 0.0)
    return directory


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_report_on_a_strangers_run(tmp_path, capsys, name):
    run = run_named(tmp_path / "run", name)
    assert main([str(run)]) == 0
    told = capsys.readouterr()
    assert "\x1b" not in told.out + told.err
    page = (run / "report.html").read_text()
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    assert not set("<>&") & set(data)
    (block,) = json.loads(data)["blocks"]
    assert block["tasks"][0] == TASK
    assert block["rows"][0]["command"].startswith("python -m cl_bench # /*JS*/ ")
    assert page.count('"use strict";\n(() => {') == 1  # the page's own script, in its own place
    line = next(csv.DictReader(io.StringIO((run / "report.csv").read_text())))
    assert line["strategy"].lstrip("'") == block["rows"][0]["label"]
    assert not line["strategy"].startswith(("=", "+", "-", "@"))
    card = model_card(run, 2, "")
    for text in ((run / "report.md").read_text(), card):
        assert "\x1b" not in text
        assert "<" not in re.sub(r"`[^`\n]*`", "", text)
        assert not re.search(r"(?<!\\)\]\(", text)
    tex = (run / "report.tex").read_text()
    row = next(t for t in tex.splitlines() if t.endswith("\\\\") and "&" in t and "seed" not in t)
    assert not re.search(r"\\(input|write|def)", tex)
    assert row


def test_what_each_format_makes_of_a_text():
    assert json.loads(script({"a": "</script>&"})) == {"a": "</script>&"}
    assert csv_cell("=1+1") == "'=1+1"
    assert csv_cell("gpm threshold=0.9") == "gpm threshold=0.9"
    assert csv_cell("-1.5") == "'-1.5"
    assert markdown("perm_0 a|b\nc") == r"perm_0 a\|b c"
    assert html.unescape(markdown("<b>")) == "<b>"
    assert latex("a_b 50 % {x} \\y ±") == r"a\_b 50 \% \{x\} \textbackslash{}y $\pm$"
    assert latex("[1]") == "{[}1{]}"
