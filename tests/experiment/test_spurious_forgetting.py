"""The phenomenon on the tiny tier (Zheng et al., ICLR 2025), by the command line, three seeds.

About half an hour on two cores, less where the pre-trained models lie in the cache. Bands stand
around what was measured; they guard the experiment. ``make test-slow`` runs them.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from cl_bench.metrics import at_chance, matched
from cl_bench.tracking import read_results

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SEEDS = (1, 2, 3)
"""Seed 0 chose how long the model is pre-trained."""
OLD, NEW = "read_about", "new_1"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Runs a strategy on the tiny tier, once for the same settings; returns its directory."""
    directory = tmp_path_factory.mktemp("biography")
    done = {}

    def run(strategy, seed, *overrides):
        key = (strategy, seed, *overrides)
        if key in done:
            return done[key]
        path = done[key] = directory / f"{len(done)}-{strategy}-{seed}"
        ran = subprocess.run(
            [
                *(sys.executable, "-m", "cl_bench", f"+strategy={strategy}"),
                *("+stream=biography/tiny", f"seed={seed}", f"run_dir={path}"),
                *("logger.mode=disabled", "probe.recovery.enabled=true"),
                *("probe.recovery.at=[40]", *overrides),
            ],
            cwd=ROOT,
            env={"OMP_NUM_THREADS": "2", **os.environ},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        return path

    return run


def curve(directory):
    events = [e for e in read_results(directory) if e["event"] == "probe"]
    return [e for e in events if e["probe"] == "curve"]


def at_step(directory, step):
    (event,) = [e for e in curve(directory) if e["step"] == step]
    return event


def alignment(directory, inside):
    events = [e for e in read_results(directory) if e["event"] == "probe"]
    found = [e for e in events if e["probe"] == "alignment" and e["task"] == 1]
    return next(e["values"][OLD] for e in found if e["inside"] is inside)


@pytest.mark.parametrize("seed", SEEDS)
def test_facts_were_read_and_are_told_of_people_whom_no_question_was_about(tiny, seed):
    before, after, *_ = [
        e for e in read_results(tiny("finetune", seed)) if e["event"] == "evaluation"
    ]
    assert before["details"][OLD]["biography"] >= 0.95
    assert before["scores"][OLD] <= 0.05
    assert after["scores"][OLD] >= 0.85
    assert after["details"][OLD]["type_rate"] >= 0.9
    control = after["details"][OLD]["control"]
    assert at_chance(control, alignment(tiny("finetune", seed), True)["chance"], 400)


@pytest.mark.parametrize("seed", SEEDS)
def test_old_answers_collapse_before_new_ones_are_learned(tiny, seed):
    start, at_40 = (at_step(tiny("finetune", seed), n) for n in (0, 40))
    assert at_40["values"][OLD] <= 0.5 * start["values"][OLD]
    assert at_40["values"][NEW] <= 0.2
    assert at_40["details"][OLD]["type_rate"] >= 0.9


@pytest.mark.parametrize("seed", SEEDS)
def test_fifty_steps_on_other_peoples_answers_bring_them_back(tiny, seed):
    found = alignment(tiny("finetune", seed), inside=True)
    ceiling = at_step(tiny("finetune", seed), 0)["values"][OLD]
    assert found["recovered"] >= 0.85 * ceiling
    assert found["spurious_fraction"] >= 0.8
    assert at_chance(found["recover_ctrl"], found["chance"], 400)


def test_frozen_bottom_layers_keep_more_where_the_new_task_is_learned_equally_well(tiny):
    """Paired over seeds, old answers where the new task first is at 98 %. The biography probe is
    printed beside them, whichever way it speaks."""
    ratios, lines = [], []
    for seed in SEEDS:
        kept = {}
        for strategy in ("finetune", "freeze"):
            points = curve(tiny(strategy, seed))
            old = [p["values"][OLD] for p in points]
            new = [p["values"][NEW] for p in points]
            i = matched(old, new, 0.98)
            assert i is not None, f"{strategy}, seed {seed}: task 1 ends at {new[-1]:.3f}"
            kept[strategy] = old[i]
            probe = points[i]["details"][OLD]["biography"]
            lines.append(
                f"seed {seed} {strategy:8} step {points[i]['step']:3} new {new[i]:.3f} "
                f"old {old[i]:.3f} biography {probe:.3f}"
            )
        ends = [curve(tiny(s, seed))[-1]["values"][NEW] for s in ("finetune", "freeze")]
        assert abs(ends[0] - ends[1]) <= 0.01
        ratios.append(kept["freeze"] / kept["finetune"])
    print(*lines, f"ratios {ratios}", sep="\n")
    assert statistics.mean(ratios) >= 1.3, "\n".join(lines)


def test_with_every_block_frozen_old_answers_stay_and_new_ones_are_not_learned(tiny):
    directory = tiny("freeze", SEEDS[0], "strategy.n_blocks=4")
    start, at_400 = (at_step(directory, n) for n in (0, 400))
    assert at_400["values"][OLD] >= 0.9 * start["values"][OLD]
    assert at_400["values"][NEW] <= 0.2


def test_the_sum_of_learning_rates_decides_and_not_the_rate(tiny):
    slow = tiny(
        "finetune",
        SEEDS[0],
        "stream.rates=[0.5,0.05]",
        "stream.epochs=[8,10]",
        "eval.dense=[0,160]",
    )
    one, other = at_step(tiny("finetune", SEEDS[0]), 40), at_step(slow, 160)
    assert one["rate_sum"] == pytest.approx(other["rate_sum"])
    assert abs(one["values"][OLD] - other["values"][OLD]) < 0.1


def test_the_figures_are_there(tiny):
    directory = tiny("finetune", SEEDS[0])
    assert (directory / "curve.png").stat().st_size > 10_000
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert set(summary["probe_seconds"]) == {"alignment", "dense", "recovery"}
