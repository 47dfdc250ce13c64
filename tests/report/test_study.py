"""Runs put side by side: what belongs together, what tables say, the page in a browser."""

import csv
import io
import json
import math
import re
import shutil
import time

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from scipy import stats
from studies import NAMES, make_run

from cl_bench.contracts import UsageError
from cl_bench.report.__main__ import main
from cl_bench.report.compare import print_study, to_csv, to_latex, to_markdown
from cl_bench.report.page import page_data, render_page
from cl_bench.report.quantities import format_cost
from cl_bench.report.rows import Comparison, holm
from cl_bench.report.study import differences, read_study

ACC = {  # strategy: final scores of every seed; the tasks are learned to 0.9
    "finetune": [[0.2, 0.4, 0.9], [0.3, 0.4, 0.9], [0.25, 0.4, 0.9]],
    "gpm": [[0.7, 0.8, 0.9], [0.72, 0.8, 0.9], [0.74, 0.8, 0.9]],
    "er": [[0.6, 0.7, 0.9], [0.64, 0.7, 0.9], [0.62, 0.7, 0.9]],
    "joint": [[0.9, 0.92, 0.94]] * 3,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for strategy, scores in ACC.items():
        for seed, last in enumerate(scores):
            steps = 120 if strategy == "er" else 100
            make_run(folder / strategy / str(seed), strategy, seed, last, steps=steps)
    for seed in (0, 1):
        make_run(folder / "trgp" / str(seed), "trgp", seed, [0.9, 0.9, 0.95], known=True)
    return folder


@pytest.fixture(scope="module")
def study(runs):
    return read_study([runs])


def printed(study, width):
    console = Console(file=io.StringIO(), width=width)
    print_study(study, console)
    return console.file.getvalue()


# --- what belongs together ------------------------------------------------------------------------


def test_rows_are_seeds_and_blocks_never_cross_what_was_known(study):
    assert [(b.title, b.task_id_known) for b in study.blocks] == [
        ("digits", False),
        ("digits", True),
    ]
    assert [r.label for r in study.blocks[0].rows] == ["finetune", "gpm", "er", "joint"]
    assert [(r.label, r.n) for r in study.blocks[1].rows] == [("trgp", 2)]
    assert study.blocks[0].rows[1].seeds == [0, 1, 2]


def test_mean_and_spread_are_those_of_the_seeds(study):
    gpm = study.blocks[0].rows[1]
    acc = [np.mean(last) for last in ACC["gpm"]]
    assert gpm.mean("acc") == pytest.approx(np.mean(acc))
    assert gpm.std("acc") == pytest.approx(np.std(acc, ddof=1))
    assert gpm.mean("bwt") == pytest.approx(
        np.mean([(a - 0.9 + b - 0.9) / 2 for a, b, _ in ACC["gpm"]])
    )
    # Both learned every task to what the diagonal says; joint ended task three at 0.94.
    assert gpm.mean("intransigence") == pytest.approx((0.94 - 0.9) / 3)
    assert math.isnan(study.blocks[0].rows[3].mean("intransigence"))
    assert math.isnan(study.blocks[1].rows[0].values["intransigence"][0])


def test_other_settings_make_other_rows_and_other_streams_other_blocks(tmp_path):
    make_run(tmp_path / "a", "gpm", 0, [0.7, 0.8, 0.9])
    make_run(tmp_path / "b", "gpm", 1, [0.7, 0.8, 0.9], settings={"batch_size": 20})
    longer = {"stream": {"_target_": "cl_bench.tasks.s", "num_tasks": 4, "task_id_at_test": False}}
    make_run(tmp_path / "c", "gpm", 0, [0.7, 0.8, 0.9], settings=longer)
    study = read_study([tmp_path])
    assert [b.title for b in study.blocks] == ["digits num_tasks=3", "digits num_tasks=4"]
    rows = sorted(study.blocks[0].rows, key=lambda row: row.label)
    assert [row.label for row in rows] == ["gpm batch_size=10", "gpm batch_size=20"]
    assert differences(rows) == {"batch_size": [10, 20]}


def test_what_is_not_complete_or_was_run_again_is_left_out_and_named(tmp_path):
    make_run(tmp_path / "a", "gpm", 0, [0.7, 0.8, 0.9])
    time.sleep(0.01)
    make_run(tmp_path / "b", "gpm", 0, [0.75, 0.8, 0.9])
    make_run(tmp_path / "c", "gpm", 1, [], status="failed")
    study = read_study([tmp_path])
    (row,) = study.rows()
    assert (row.n, row.trials[0].run.directory.name) == (1, "b")
    assert sorted(study.left_out) == [
        f"{tmp_path / 'a'}: run again later, same settings",
        f"{tmp_path / 'c'}: failed, 2 of 3 tasks learned",
    ]


def test_trials_of_a_search_are_never_among_the_results(tmp_path):
    search = {"tasks": NAMES, "split": "validation"}
    make_run(tmp_path / "a", "gpm", 0, [0.7, 0.8, 0.9], facts={"search": search})
    make_run(tmp_path / "b", "gpm", 1, [0.7, 0.8, 0.9])
    study = read_study([tmp_path])
    assert [r.seeds for r in study.rows()] == [[1]]
    assert len(study.searches) == 1
    assert "1 trials of searches are left out" in printed(study, 100)


@pytest.mark.parametrize("what", ["nothing", "empty"])
def test_nothing_to_report_is_said(tmp_path, what):
    path = tmp_path / what
    if what == "empty":
        path.mkdir()
    with pytest.raises(UsageError, match=re.escape(str(path))):
        read_study([path])
    assert main([str(path)]) == 2


# --- tests and warnings ---------------------------------------------------------------------------


def test_the_best_row_is_between_the_bounds_and_the_others_are_tested_against_it(study):
    block = study.blocks[0]
    assert block.best("acc").label == "gpm"
    assert block.best("forgetting").label == "gpm"
    assert set(block.comparisons) == {"er"}
    mine, best = ([np.mean(last) for last in ACC[s]] for s in ("er", "gpm"))
    found = block.comparisons["er"]
    assert found.p == pytest.approx(stats.ttest_rel(mine, best).pvalue)
    assert found.n == 3
    assert found.difference == pytest.approx(np.mean(mine) - np.mean(best))
    assert study.blocks[1].comparisons == {}


def test_holm_by_hand():
    raw = {k: Comparison(p, 3, 0.0) for k, p in {"a": 0.01, "b": 0.04, "c": 0.03}.items()}
    adjusted = {k: c.p for k, c in holm({**raw, "d": Comparison(math.nan, 3, 0.0)}).items()}
    assert adjusted["a"] == pytest.approx(0.03)
    assert adjusted["c"] == pytest.approx(0.06)
    assert adjusted["b"] == pytest.approx(0.06), "never below a smaller p"
    assert math.isnan(adjusted["d"])


def test_costs_that_differ_by_more_than_a_tenth_are_warned_of(study):
    warnings = study.blocks[0].warnings()
    assert any(
        w.startswith("optimizer steps: 1.20 times, 100") and "120 (er)" in w for w in warnings
    )
    assert not any(w.startswith(("peak memory", "strategy memory")) for w in warnings)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("wall_seconds", 59.94, "59.9 s"),
        ("wall_seconds", 125.0, "2:05 min"),
        ("strategy_bytes", 0.0, "0 B"),
        ("strategy_bytes", 137_100.0, "137.1 kB"),
        ("peak_memory_bytes", 2.5e12, "2500.0 GB"),
        ("inference_overhead", 1.234, "1.23x"),
        ("optimizer_steps", 12345.0, "12,345"),
        ("optimizer_steps", math.nan, "-"),
    ],
)
def test_costs_have_units(name, value, text):
    assert format_cost(name, value) == text


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_nothing_of_a_terminal_table_is_cut_off(study, width):
    text = printed(study, width)
    tables = [
        line for line in text.splitlines() if not line.startswith(("percent", "p:", "!", "n ="))
    ]
    assert max(map(cell_len, tables)) <= width
    assert "…" not in text
    words = set(text.split())
    assert words >= {"optimizer", "steps", "inference", "overhead", "1.00x", "2.0", "kB", "AIA"}
    for words in ("80.7 ± 0.7", "task id known", "120", "500.0 MB"):
        assert words in text
    assert text.index("task id not known") < text.index("task id known at test")


def test_the_best_is_bold_in_every_format(study):
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    print_study(study, console)
    assert "\x1b[1;32m80.7 ± 0.7\x1b[0m" in console.file.getvalue()
    assert "| gpm | 3 | **80.67 ± 0.67** |" in to_markdown(study)
    assert "gpm & 3 & $\\mathbf{80.67} \\pm 0.67$ &" in to_latex(study)
    assert "_" not in re.sub(r"\\_|\$.*?\$", "", to_latex(study).split("\\usepackage")[-1])


def test_csv_has_all_digits(study):
    rows = list(csv.DictReader(io.StringIO(to_csv(study))))
    gpm = next(r for r in rows if r["strategy"] == "gpm")
    assert float(gpm["acc_mean"]) == np.mean([np.mean(last) for last in ACC["gpm"]])
    assert (gpm["seeds"], gpm["task_id_known"], gpm["acc_p_paired_t_holm"]) == (
        "0 1 2",
        "False",
        "",
    )
    er = next(r for r in rows if r["strategy"] == "er")
    assert 0 < float(er["acc_p_paired_t_holm"]) < 0.05
    assert next(r for r in rows if r["strategy"] == "joint")["intransigence_mean"] == ""


def test_chosen_hyperparameters_are_flagged_everywhere(tmp_path):
    selection = {"tasks": ["one", "two"], "split": "validation", "trials": 20}
    make_run(tmp_path / "a", "gpm", 0, [0.7, 0.8, 0.9], facts={"selection": selection})
    study = read_study([tmp_path])
    data = json.dumps(page_data(study, [tmp_path]))
    for text in (printed(study, 100), to_markdown(study), data):
        assert "20 trials on validation data of one, two" in text
    assert "gpm †" in printed(study, 100)
    assert "$^\\dagger$" in to_latex(study)
    assert to_csv(study).splitlines()[1].endswith(",one two")


# --- the page -------------------------------------------------------------------------------------


def test_the_page_is_one_small_file_without_network(runs, study):
    page = render_page(study, [runs])
    assert len(page.encode()) < 5_000_000
    ours = re.sub(r"<script>/\*\*\n\* plotly\.js.*?</script>", "", page, flags=re.S)
    assert len(ours) < 400_000
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", ours)
    assert not re.search(r"@import|url\(\s*[\"']?http|fetch\(|XMLHttpRequest", ours)
    embedded = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1]
    made = page_data(study, [runs])
    assert json.loads(embedded)["blocks"] == made["blocks"]


def test_a_name_cannot_end_the_script(tmp_path):
    make_run(tmp_path / "a", "</script><b>", 0, [0.7, 0.8, 0.9])
    page = render_page(read_study([tmp_path]), [tmp_path])
    assert "</script><b>" not in page


def test_published_numbers_are_those_of_the_same_strategy(tmp_path):
    reference = {"strategy": "gpm", "acc": 93.91, "acc_std": 0.16, "bwt": -3.0, "source": "CUBER"}
    for strategy in ("gpm", "er"):
        settings = {"reference": reference}
        make_run(tmp_path / strategy, strategy, 0, [0.7, 0.8, 0.9], settings=settings)
    er, gpm = sorted(read_study([tmp_path]).rows(), key=lambda r: r.label)
    assert er.reference is None
    (block,) = page_data(read_study([tmp_path]), [tmp_path])["blocks"]
    found = next(r for r in block["rows"] if r["label"] == "gpm")["reference"]
    assert found["metrics"]["acc"] == {"mean": 93.91, "std": 0.16}
    assert found["metrics"]["bwt"] == {"mean": -3.0, "std": None}
    assert gpm.reference["source"] == "CUBER"


def test_the_command_writes_all_files(runs, tmp_path, capsys):
    assert main([str(runs), "--out", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "report.csv",
        "report.html",
        "report.md",
        "report.tex",
    ]
    assert "report.html" in capsys.readouterr().out


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, Debian's."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium or chromedriver here (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()


SIZES = {"desktop": (1240, 900, "light"), "phone": (390, 844, "light"), "dark": (1240, 900, "dark")}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("size", SIZES)
def test_the_page_in_a_browser(browser, runs, study, tmp_path, size):
    width, height, scheme = SIZES[size]
    path = tmp_path / "report.html"
    path.write_text(render_page(study, [runs]))
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", {
        "offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0,
    })  # fmt: skip
    browser.get(path.as_uri())
    ask = browser.execute_script
    deadline = time.monotonic() + 90
    while not ask("return document.documentElement.dataset.ready"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert browser.get_log("browser") == []
    assert ask("return document.documentElement.scrollWidth") <= width, "nothing sticks out"

    titles = ask("return [...document.querySelectorAll('h3')].map(h => h.textContent)")
    for title in ("Results", "Accuracy matrices", "Cost", "Forgetting of each task at the end"):
        assert title in titles
    labels = ask(
        "return [...document.querySelectorAll('.plot')].map(p => "
        "[...p.querySelectorAll('.xtitle,.ytitle')].map(t => t.textContent))"
    )
    assert all(len(pair) == 2 and all(pair) for pair in labels), "every chart names both axes"
    assert ["plasticity: learning accuracy (%)", "stability: backward transfer (points)"] in labels

    # In the first block: four strategies; the line of each, and its band.
    first = "document.querySelector('#block-0')"
    counts = ask(
        f"const cards = [...{first}.querySelectorAll('.card')];"
        "const of = (t) => cards.find(c => c.querySelector('h3').textContent.startsWith(t));"
        "return ['Stability', 'Mean accuracy', 'Forgetting', 'Accuracy matrices']"
        ".map(t => [...of(t).querySelectorAll('.plot')].map(p => p.data.length))"
    )
    assert counts == [[4], [8], [4], [1, 1, 1, 1]]

    # Sorting by ACC, downwards and then upwards; the numbers decide, not their text.
    body = f"{first}.querySelectorAll('table')[0].tBodies[0]"
    column = f"[...{body}.rows].map(r => r.cells[2].textContent)"
    button = f"{first}.querySelectorAll('thead button')[2]"
    ask(f"{button}.click()")
    down = ask(f"return {column}")
    ask(f"{button}.click()")
    assert ask(f"return {column}") == down[::-1]
    assert down[0].startswith("92.0")

    # A strategy can be hidden in all charts, and comes back.
    toggle = f"{first}.querySelector('.legend button')"
    shown = f"return {first}.querySelector('.two .plot').data.length"
    ask(f"{toggle}.click()")
    time.sleep(0.5)
    assert ask(shown) == 3
    ask(f"{toggle}.click()")
    time.sleep(0.5)
    assert ask(shown) == 4

    from PIL import Image

    browser.save_screenshot(str(tmp_path / "page.png"))
    with Image.open(tmp_path / "page.png") as image:
        pixels = np.asarray(image.convert("L"), dtype=float)
    assert pixels.std() > 5
    assert (pixels.mean() < 100) == (scheme == "dark")
    for plot in browser.find_elements("css selector", "#block-0 .plot")[:3]:
        plot.screenshot(str(tmp_path / "plot.png"))
        with Image.open(tmp_path / "plot.png") as image:
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20, "something is drawn"
