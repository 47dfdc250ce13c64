"""Tables and figures of a run, rebuilt from its directory alone."""

import io
import subprocess
import sys
import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image
from rich.cells import cell_len
from rich.console import Console

from cl_bench.contracts import UsageError
from cl_bench.metrics import empty_matrix, summarise
from cl_bench.report import (
    accuracy_matrix_figure,
    forgetting_figure,
    matrix_table,
    print_run,
    summary_table,
    write_figures,
)
from cl_bench.report.plots import cell_colours
from cl_bench.tracking import open_record

R = np.array(
    [
        [0.10, 0.20, 0.15],
        [0.90, 0.30, 0.25],
        [0.95, 0.80, 0.35],
        [0.50, 0.60, 0.70],
    ]
)
NAMES = ["perm-1", "perm-2", "perm-3"]


def printed(*renderables, width=100):
    console = Console(file=io.StringIO(), width=width)
    for renderable in renderables:
        console.print(renderable)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def many(tasks):
    """A stream in which every task is learned to 95.6 % and loses half a point per later task."""
    matrix = empty_matrix(tasks)
    for i in range(1, tasks + 1):
        matrix[i, :i] = 0.956 - 0.005 * (i - 1 - np.arange(i))
    return matrix


@pytest.fixture
def run(tmp_path):
    facts = {"stream": "permuted_digits", "strategy": "gpm", "seed": 7}
    with open_record(tmp_path / "run", NAMES, task_id_known=False, facts=facts) as record:
        for row, scores in enumerate(R):
            record.row(row, row - 1 if row else None, dict(zip(NAMES, scores, strict=True)), 0.1)
    return tmp_path / "run"


# --- tables ---------------------------------------------------------------------------------------


def test_the_matrix_in_percent():
    assert printed(matrix_table(R, NAMES)) == [
        "accuracy (%)",
        "after task  perm-1 perm-2 perm-3",
        "0 untrained   10.0   20.0   15.0",
        "1 perm-1      90.0   30.0   25.0",
        "2 perm-2      95.0   80.0   35.0",
        "3 perm-3      50.0   60.0   70.0",
    ]


def test_cells_that_were_not_evaluated_are_dots_and_empty_rows_are_left_out():
    partial = R.copy()
    partial[0] = partial[3] = partial[1, 1:] = np.nan
    assert printed(matrix_table(partial, NAMES))[1:] == [
        "after task perm-1 perm-2 perm-3",
        "1 perm-1     90.0      ·      ·",
        "2 perm-2     95.0   80.0   35.0",
    ]


def test_only_the_diagonal_is_underlined_and_only_learned_tasks_are_coloured():
    table = matrix_table(R, NAMES)
    cells = [list(column.cells) for column in table.columns[1:]]

    def styles(row, column):
        text = cells[column][row]
        return " ".join([str(text.style), *(str(span.style) for span in text.spans)])

    for row in range(4):
        for column in range(3):
            assert ("underline" in styles(row, column)) == (row == column + 1)
            assert (" on #" in styles(row, column)) == (column < row)
            assert ("dim" in styles(row, column)) == (column >= row)


@pytest.mark.parametrize("tasks", [1, 2, 12, 13, 17, 20, 21, 22, 50, 200])
@pytest.mark.parametrize("name", ["t{}", "permutation-{}-of-the-pixels"])
@pytest.mark.parametrize("width", [40, 80, 100])
def test_any_number_of_tasks_fits_the_console_and_ends_with_the_last_row(tasks, name, width):
    names = [name.format(k) for k in range(tasks)]
    lines, narrow = (
        printed(matrix_table(many(tasks), names, width), width=w) for w in (300, width)
    )
    remark = next((i for i, line in enumerate(lines) if "tasks; the others" in line), None)
    assert lines[:remark] == narrow[:remark], "nothing is cut off or wrapped"
    assert max(map(cell_len, narrow)) <= width
    last = lines[:remark][-1]
    assert last.split()[0] == str(tasks)
    assert last.split()[-1] in ("95.6", "96")
    assert (remark is None) == (tasks <= {40: 6, 80: 16, 100: 21}[width])


def test_twenty_tasks_are_all_shown():
    lines = printed(matrix_table(many(20), [f"classes-{k}" for k in range(20)]))
    assert lines[1].split()[2:] == [str(k + 1) for k in range(20)]
    assert lines[21].split()[2:] == [f"{95.6 - 0.5 * (19 - j):.0f}" for j in range(20)]


def test_the_summary_in_percent_says_what_was_known():
    lines = printed(summary_table(summarise(R), task_id_known=False))
    assert lines[0] == "summary (%, task id not known at test time)"
    assert {line.split()[0]: line.split()[1] for line in lines[1:]} == {
        "ACC": "60.0",
        "BWT": "-30.0",
        "FWT": "+15.0",
        "forgetting": "32.5",
        "LA": "80.0",
        "AIA": f"{100 * (0.9 + 0.875 + 0.6) / 3:.1f}",
    }
    known = printed(summary_table(summarise(R), task_id_known=True))
    assert known[0] == "summary (%, task id known at test time)"


def test_what_is_undefined_is_a_dash():
    lines = printed(summary_table(summarise(R[:2, :1]), task_id_known=True))
    assert [line.split()[1] for line in lines[1:]] == ["90.0", "-", "-", "-", "90.0", "90.0"]


def test_print_run_needs_the_directory_alone(run):
    console = Console(file=io.StringIO(), width=100)
    print_run(run, console)
    text = console.file.getvalue()
    assert text.startswith("permuted_digits · gpm · seed 7\n")
    assert "3 perm-3      50.0   60.0   70.0" in text
    assert "ACC          60.0" in text


def test_print_run_fits_the_console(tmp_path):
    names = [f"perm_{i}" for i in range(10)]
    with open_record(tmp_path / "run", names, task_id_known=False) as record:
        for row, scores in enumerate(many(10)[1:], start=1):
            seen = dict(zip(names[:row], scores, strict=False))
            record.row(row, row - 1, seen, 0.1)
    for width, header in ((80, "1     2     3"), (100, "perm_0 perm_1"), (200, "perm_0 perm_1")):
        console = Console(file=io.StringIO(), width=width)
        print_run(tmp_path / "run", console)
        lines = console.file.getvalue().splitlines()
        assert max(map(cell_len, lines)) <= width
        assert header in lines[2]
        assert not any("…" in line for line in lines)


def test_print_run_says_that_a_run_failed(tmp_path):
    with open_record(tmp_path / "run", NAMES, task_id_known=True) as record:
        record.row(1, 0, {"perm-1": 0.9}, 0.1)
        record.finish("failed")
    console = Console(file=io.StringIO(), width=100)
    print_run(tmp_path / "run", console)
    assert console.file.getvalue().startswith("run  failed, 1 of 3 tasks learned\n")


# --- figures --------------------------------------------------------------------------------------


def test_figures_need_the_directory_alone(run):
    paths = write_figures(run)
    assert [p.name for p in paths] == ["accuracy_matrix.png", "forgetting.png"]
    for path in paths:
        with Image.open(path) as image:
            assert image.width > 600
            assert image.height > 400
            assert round(image.info["dpi"][0]) == 150
    first = [p.read_bytes() for p in paths]
    assert [p.read_bytes() for p in write_figures(run)] == first


def test_figures_of_nothing_are_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        write_figures(tmp_path)


def texts(axes):
    return [t.get_text() for t in axes.texts]


def test_the_heatmap_shows_every_cell_in_percent():
    figure = accuracy_matrix_figure(R, NAMES, "permuted_digits · gpm · seed 7")
    axes = figure.axes[0]
    assert texts(axes)[:-1] == [f"{100 * v:.1f}" for v in R.ravel()]
    assert texts(axes)[-1] == "permuted_digits · gpm · seed 7"
    assert [t.get_text() for t in axes.get_xticklabels()] == NAMES
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        "before training",
        "after task 1",
        "after task 2",
        "after task 3",
    ]
    np.testing.assert_array_equal(axes.images[0].get_array(), R)
    outlined = [p.get_xy() for p in axes.patches if not p.get_fill()]
    assert outlined == [(-0.5, 0.5), (0.5, 1.5), (1.5, 2.5)]


def test_nan_cells_of_the_heatmap_stay_empty():
    partial = R.copy()
    partial[0] = np.nan
    axes = accuracy_matrix_figure(partial, NAMES).axes[0]
    assert texts(axes)[:-1] == [f"{100 * v:.1f}" for v in R[1:].ravel()]
    assert axes.images[0].get_array().mask[0].all()
    assert "hatched: not evaluated" in axes.get_xlabel()


def test_the_forgetting_figure_shows_the_numbers():
    left, right = forgetting_figure(R, NAMES, "title").axes
    lines = {line.get_label(): line.get_ydata() for line in left.lines}
    assert lines["mean over seen"] == pytest.approx([90.0, 87.5, 60.0])
    assert left.lines[0].get_ydata() == pytest.approx([90.0, 95.0, 50.0])
    assert left.lines[0].get_xdata() == pytest.approx([1, 2, 3])
    assert [bar.get_width() for bar in right.patches] == pytest.approx([45.0, 20.0])
    assert [t.get_text() for t in right.get_yticklabels()] == NAMES[:2]
    assert right.get_title(loc="left") == "Forgotten after 3 tasks, mean 32.5"


def awkward():
    torn = R.copy()
    torn[2] = np.nan
    gained = R.copy()
    gained[3] = [0.99, 0.99, 0.7]
    return {
        "no row yet": empty_matrix(3),
        "before training only": np.vstack([R[:1], np.full((3, 3), np.nan)]),
        "one task learned": np.vstack([R[:2], np.full((2, 3), np.nan)]),
        "a row is missing": torn,
        "old tasks improved": gained,
        "all zero": np.zeros((4, 3)),
        "all one": np.ones((4, 3)),
    }


@pytest.mark.parametrize("case", awkward())
def test_awkward_runs_can_be_drawn_without_warnings(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for draw in (accuracy_matrix_figure, forgetting_figure):
            draw(awkward()[case], NAMES).savefig(io.BytesIO())
        printed(matrix_table(awkward()[case], NAMES))


def test_drawing_leaves_matplotlib_as_it_was(run):
    code = (
        "import sys, matplotlib\n"
        "before = matplotlib.rcParams.copy()\n"
        "from cl_bench.report import write_figures\n"
        f"write_figures({str(run)!r})\n"
        "assert matplotlib.rcParams.copy() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("score", np.linspace(0, 1, 21))
def test_numbers_stand_out_from_their_cells(score):
    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    dark, light = sorted(luminance(to_rgb(c)) for c in cell_colours(score))
    assert (light + 0.05) / (dark + 0.05) > 3.0  # WCAG 2, large text
    assert matplotlib.colors.is_color_like(cell_colours(score)[0])
