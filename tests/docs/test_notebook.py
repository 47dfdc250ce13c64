"""The notebook in docs/ runs, and shows what it would show if it ran today."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "notebook.ipynb"


def test_the_notebook_runs_as_it_is_shown(tmp_path, monkeypatch, capsys):
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in cells)
    monkeypatch.chdir(tmp_path)
    # A picture in a notebook is a picture in a file here.
    display = ModuleType("IPython.display")
    display.Image = lambda filename, width: Path(filename).stat()
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    names: dict[str, object] = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
    printed = capsys.readouterr().out
    shown = "".join("".join(output.get("text", "")) for cell in cells for output in cell["outputs"])
    scores = re.findall(r"(ACC|BWT) ([+-]?\d\.\d+)", shown)
    assert len(scores) == 4
    # Another kind of CPU rounds otherwise; what the text says must stay true.
    again = re.findall(r"(ACC|BWT) ([+-]?\d\.\d+)", printed)
    for (name, then), (same, now) in zip(scores, again, strict=True):
        assert name == same
        assert abs(float(then) - float(now)) < 0.05
