"""What a paper prints: LaTeX that compiles, figures without a label on another."""

import itertools
import math
import re
import shutil
import subprocess
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axis import Axis
from matplotlib.text import Text
from studies import make_run

from cl_bench.contracts import UsageError
from cl_bench.report.figures import KINDS, pareto, write_figure
from cl_bench.report.latex import PREAMBLE, Wishes, latex_table
from cl_bench.report.paper import main
from cl_bench.report.plots import accuracy_matrix_figure, confusion_figure, forgetting_figure
from cl_bench.report.rows import Block, Row
from cl_bench.report.trials import Trial
from cl_bench.tracking import Run


def trial(strategy, seed, R, **facts):
    names = [f"task number {j + 1}" for j in range(R.shape[1])]
    run = Run(Path(strategy), names, R, False, "completed", {"strategy": strategy, "seed": seed,
              **facts}, np.full_like(R, np.nan))  # fmt: skip
    costs = {"wall_seconds": 10.0 * (1 + len(strategy)), "strategy_bytes": 0, "exemplars": 0}
    return Trial(run, costs, {}, None, None, "", "")


def block(labels, tasks=5, seeds=3, spread=0.01):
    """Rows that are 2 points apart, the first the worst."""
    rows = []
    for place, label in enumerate(labels):
        trials = []
        for seed in range(seeds):
            draw = np.random.default_rng([seed, place])
            R = np.clip(0.3 + 0.02 * place + draw.normal(0, spread, (tasks + 1, tasks)), 0, 1)
            trials.append(trial(label, seed, R))
        rows.append(Row(label, trials))
    return Block("permuted_digits", "permuted_digits", False, rows[::-1])


TWENTY = [f"method_{k} threshold=0.{k}" for k in range(20)]


# --- tables ---------------------------------------------------------------------------------------


def test_the_best_is_bold_only_where_the_test_tells_it_from_every_other_row():
    apart = latex_table(block(["a", "b", "c"], spread=1e-4))
    assert apart.count("\\mathbf") >= 1
    assert "tells it from every other row" in apart
    close = block(["a", "b", "c"], spread=1e-4)
    close.rows[1] = Row("twin", [trial("twin", t.seed, t.run.matrix + 1e-3 * (t.seed - 1))
                                 for t in close.rows[0].trials])  # fmt: skip
    assert close.carried("acc") is None
    assert "\\mathbf" not in latex_table(close, Wishes(columns=["acc"]))
    assert "none is marked as the best" in latex_table(close)
    two = block(["a", "b"], seeds=2, spread=1e-4)
    assert two.best("acc") is not None
    assert two.carried("acc") is None, "two pairs are no test"


def test_columns_names_label_and_caption_are_those_asked_for():
    wishes = Wishes(
        columns=["acc", "wall_seconds"],
        rows=["b", "a"],
        names={"a": "Method A & co", "acc": "Accuracy"},
        label="tab:main",
    )
    text = latex_table(block(["a", "b", "c"]), wishes)
    lines = [line.strip() for line in text.splitlines()]
    assert "strategy & Accuracy $\\uparrow$ & time \\\\" in lines
    body = lines[lines.index("\\midrule") + 1 : lines.index("\\bottomrule")]
    assert [line.split(" & ")[0] for line in body] == ["b", "Method A \\& co"]
    assert "\\label{tab:main}" in lines
    (caption,) = [line for line in lines if line.startswith("\\caption")]
    assert caption.count(". ") == 0
    assert caption.endswith(".}")


def test_a_minus_is_a_minus_and_never_stands_before_nothing():
    R = np.array([[0.1, 0.1], [0.9, 0.1], [0.5, 0.9]])
    forgot = Block("s", "s", False, [Row("a", [trial("a", 0, R)])])
    assert "$-40.00$" in latex_table(forgot, Wishes(columns=["bwt"]))
    R = np.array([[0.1, 0.1], [0.9, 0.1], [0.9 - 1e-6, 0.9]])
    kept = Block("s", "s", False, [Row("a", [trial("a", 0, R)])])
    assert "$0.00$" in latex_table(kept, Wishes(columns=["bwt"]))


@pytest.mark.parametrize(("wishes", "said"), [
    (Wishes(columns=["accc"]), "--columns accc"),
    (Wishes(rows=["d"]), "--rows d"),
])  # fmt: skip
def test_what_is_not_there_is_refused_with_what_is(wishes, said):
    with pytest.raises(UsageError, match=said):
        latex_table(block(["a", "b"]), wishes)


def compiled(folder, tables):
    pdflatex = shutil.which("pdflatex")
    if not pdflatex:
        pytest.skip("no pdflatex here (Debian: texlive-latex-base, texlive-latex-recommended)")
    (folder / "figure.pdf").write_bytes(
        write_figure(KINDS["curve"](block(TWENTY), Wishes(), 4.5), Path("figure.pdf"))
    )
    (folder / "paper.tex").write_text(
        "\\documentclass[twocolumn]{article}\n\\usepackage{booktabs}\n\\usepackage{graphicx}\n"
        "\\begin{document}\n" + "\n\n".join(tables) + "\n\\begin{figure*}\\centering"
        "\\includegraphics{figure}\\caption{A figure.}\\end{figure*}\nText.\\end{document}\n"
    )
    run = [pdflatex, "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True)
    log = (folder / "paper.log").read_text(errors="replace")
    assert done.returncode == 0, log[-2000:]
    return log


def test_latex_takes_it_without_an_error_or_an_overfull_box(tmp_path):
    strange = block(["müller→x", "a_b·c \u00d7 {d} $e$", "日本 [f] <g>"])
    tables = [PREAMBLE + latex_table(b) for b in (block(TWENTY), block(["a"], seeds=1), strange)]
    log = compiled(tmp_path, tables)
    assert "Overfull" not in log
    assert "Missing character" not in log


# --- figures --------------------------------------------------------------------------------------


def texts(figure):
    """Every text that is drawn, with its box in pixels; of ticks, those inside the view."""
    figure.draw_without_rendering()
    hidden = set()
    for axis in figure.findobj(Axis):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                hidden |= {tick.label1, tick.label2}
    return [
        (t, t.get_window_extent()) for t in figure.findobj(Text)
        if t.get_visible() and t.get_text().strip() and t not in hidden
    ]  # fmt: skip


def require_readable(figure):
    found = texts(figure)
    whole = figure.bbox
    assert max(figure.get_size_inches()) < 20
    for text, box in found:
        inside = (box.x0, -box.x1, box.y0, -box.y1)
        least = (whole.x0, -whole.x1, whole.y0, -whole.y1)
        assert all(a >= b - 2 for a, b in zip(inside, least, strict=True)), text.get_text()
    level = [(t, b) for t, b in found if t.get_rotation() % 90 == 0]
    for (one, a), (two, b) in itertools.combinations(level, 2):
        wide = min(a.x1, b.x1) - max(a.x0, b.x0)
        high = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(wide + 3, high) < 1, f"{one.get_text()!r} on {two.get_text()!r}"
    tilted = [t for t, _ in found if t.get_rotation() % 90]
    places = sorted(t.get_transform().transform(t.get_position())[0] for t in tilted)
    if len(places) > 1:
        apart = tilted[0].get_fontsize() * figure.dpi / 72 / math.sin(math.radians(45))
        assert np.diff(places).min() > 0.9 * apart


SIZES = {"one method, one task": (["gpm"], 1), "twenty methods": (TWENTY, 10),
         "200 tasks": (["gpm", "er"], 200)}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"matrix"}))
@pytest.mark.parametrize("size", SIZES)
def test_no_label_lies_on_another_in_a_figure_for_print(kind, size):
    labels, tasks = SIZES[size]
    require_readable(KINDS[kind](block(labels, tasks), Wishes(), 5.5))


@pytest.mark.parametrize("tasks", [1, 20, 200])
def test_no_label_lies_on_another_in_a_run_of_many_tasks(tasks):
    row = block(["gpm"], tasks, seeds=1).rows[0]
    names, R = row.trials[0].run.task_names, row.matrices[0]
    require_readable(accuracy_matrix_figure(R, names, "gpm"))
    if tasks == 200:
        require_readable(confusion_figure(np.full((tasks, tasks), 0.1), names, "gpm"))
    figure = forgetting_figure(R, names, "gpm")
    figure.axes[0].get_legend().remove()  # matplotlib looks for the best place itself
    require_readable(figure)


def test_a_figure_is_vectors_and_the_same_bytes_again():
    draw = KINDS["curve"](block(["a", "b"]), Wishes(names={"a": "Méthode A"}), 5.5)
    svg = write_figure(draw, Path("f.svg"))
    assert b"<image" not in svg
    assert svg == write_figure(draw, Path("f.svg"))
    pdf = write_figure(draw, Path("f.pdf"))
    assert pdf == write_figure(draw, Path("f.pdf"))
    assert b"/FontType 42" in pdf or b"/CIDFontType2" in pdf or b"/TrueType" in pdf
    assert b"/Subtype /Image" not in pdf
    with pytest.raises(UsageError, match=r"\.pdf or \.svg"):
        write_figure(draw, Path("f.png"))


def test_the_band_of_a_curve_is_the_seeds_spread():
    rows = block(["a"], 3)
    axes = KINDS["curve"](rows, Wishes(), 5.5).axes[0]
    means = [[100 * R[i, :i].mean() for i in (1, 2, 3)] for R in rows.rows[0].matrices]
    assert axes.lines[0].get_ydata() == pytest.approx(np.mean(means, 0))
    (band,) = axes.collections
    top = max(y for x, y in band.get_paths()[0].vertices if x == 3)
    assert top == pytest.approx((np.mean(means, 0) + np.std(means, 0, ddof=1))[2])


def test_no_two_rows_look_alike_without_lines():
    """Bounds are grey, both of them."""
    rows = block(TWENTY)
    for place, bound in ((0, "upper"), (7, "lower")):
        old = rows.rows[place]
        trials = [trial(old.label, t.seed, t.run.matrix, bound=bound) for t in old.trials]
        rows.rows[place] = Row(old.label, trials)
    figure = KINDS["cost"](rows, Wishes(), 5.5)
    points = [c.lines[0] for c in figure.axes[0].containers]
    assert len({(p.get_color(), p.get_marker()) for p in points}) == len(TWENTY)


@pytest.mark.parametrize("costs", [(0.0, 4e6), (4.0, 3e3)])
def test_no_figure_shows_the_source_of_a_formula(costs):
    """Costs far apart are on a logarithmic axis, whose own labels are mathematics."""
    rows = block(["a", "b"])
    for row, cost in zip(rows.rows, costs, strict=True):
        row.trials = [replace(t, summary={"strategy_bytes": cost}) for t in row.trials]
    figure = KINDS["cost"](rows, Wishes(columns=("strategy_bytes",)), 5.5)
    axis = figure.axes[0].xaxis
    assert axis.get_scale() != "linear"
    figure.canvas.draw()
    said = [label.get_text() for label in axis.get_ticklabels(which="both")]
    assert any(said)
    assert not [text for text in said if "$" in text]
    assert {"1 k", "1 M"} & set(said)
    require_readable(figure)


def test_the_front_by_hand():
    points = [(1, 50), (2, 40), (2, 60), (3, 60), (5, 80), (4, 70)]
    assert pareto(points) == [0, 2, 5, 4]
    assert pareto([(1, 1)]) == [0]


# --- the command ----------------------------------------------------------------------------------


def test_a_table_and_a_figure_by_two_commands(tmp_path, capsys):
    for strategy, seed in itertools.product(("gpm", "er"), range(3)):
        shift = 0.01 * seed + 0.1 * (strategy == "gpm")
        make_run(tmp_path / "runs" / strategy / str(seed), strategy, seed, [0.5 + shift, 0.6, 0.9])
    make_run(tmp_path / "runs/trgp", "trgp", 0, [0.9, 0.9, 0.9], known=True)
    runs, table = str(tmp_path / "runs"), tmp_path / "out/table.tex"
    words = ["table", runs, "--out", str(table), "--columns", "acc,bwt", "--names", "gpm=GPM"]
    assert main(words) == 2
    assert "the report has 2 tables: 1 is digits, task id not known" in capsys.readouterr().err
    assert main([*words, "--block", "1", "--label", "tab:a"]) == 0
    assert "GPM & $\\mathbf{" in table.read_text()
    svg = tmp_path / "figure.svg"
    assert main(["figure", runs, "--out", str(svg), "--block", "1", "--kind", "scores"]) == 0
    assert svg.read_bytes().startswith(b"<?xml")
    assert zlib.crc32(svg.read_bytes())
    assert re.search("no such row", _refused(runs, svg, capsys))


def _refused(runs, out, capsys):
    words = ["figure", runs, "--out", str(out), "--block", "1", "--rows", "gmp"]
    assert main(words) == 2
    return capsys.readouterr().err
