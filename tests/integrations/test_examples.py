"""The examples of ``docs/integrations.md`` run as they are printed, and keep what the page says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loops import accuracy, own_cache  # noqa: F401

from cl_bench.integrations import GuardCallback, Guarded
from cl_bench.report.page import render_page
from cl_bench.report.study import read_study
from cl_bench.strategies.penalty.ewc import EWC

DOCS = Path(__file__).parents[2] / "docs/integrations.md"


SNIPPETS = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)


ABOUT = ("plain", "report", "lightning", "transformers", "trl", "accelerate")


def printed(about):
    """The page's example, run."""
    code = SNIPPETS[ABOUT.index(about)]
    namespace = {"__name__": "docs"}
    exec(compile(code, f"{DOCS.name}[{about}]", "exec"), namespace)
    return namespace


def test_the_page_has_these_examples():
    assert len(SNIPPETS) == len(ABOUT)


@pytest.mark.parametrize("about", ["plain", "lightning", "accelerate"])
def test_docs_run_as_printed(about):
    namespace = printed(about)
    model = namespace.get("model") or namespace["module"].network
    strategy = namespace.get("strategy") or namespace["guard"].strategy
    assert [M.shape[1] > 0 for M in strategy.memory.values()] == [True, True]
    assert accuracy(model, 0) > 0.8
    assert accuracy(model, 1) > 0.6


def test_the_report_of_the_docs():
    namespace = printed("report")
    report = namespace["report"]
    assert report.matrix.shape == (3, 2)
    assert report.matrix[1, 0] > 0.8
    assert report.matrix[2, 0] > report.matrix[1, 0] - 0.1
    assert (report.directory / "summary.json").exists()
    assert (report.directory / "accuracy_matrix.png").exists()
    page = render_page(read_study([report.directory]), [report.directory])
    assert "own_loop" in page
    assert "ewc" in page


def test_the_trainer_of_the_docs():
    namespace = printed("transformers")
    assert namespace["guard"].tasks == 2
    assert namespace["guard"].strategy.information


@pytest.mark.slow
def test_the_on_policy_trainer_of_the_docs():
    pytest.importorskip("trl", reason="the example needs trl, which nothing else here does")
    moved = printed("trl")["moved"]
    assert len(moved) == 6
    for way in ("from answers", "by reward", "from itself"):
        for task in ("read_about", "new_1"):
            assert 0 <= moved[way, "GPM"][task] < moved[way, "Finetune"][task] / 10


@pytest.mark.slow
@pytest.mark.parametrize("way", ["by reward", "from itself"])
def test_a_penalty_joins_the_loss_of_trls_on_policy_trainers(way):
    pytest.importorskip("trl", reason="needs trl, which nothing else here does")
    page = {"__name__": "docs"}
    exec(SNIPPETS[ABOUT.index("trl")].partition("\ntest = ")[0], page)

    def moved(strength):
        torch.manual_seed(0)
        model = page["gpt"](len(page["words"]), depth=1, width=16, heads=2, context=64)
        model.generation_config.update(pad_token_id=0, eos_token_id=1)
        guard = Guarded(model, EWC(strength, samples=8))
        for task in page["world"]:
            texts, sample = page["asked"](task)
            callback = GuardCallback(guard, sample=sample)
            known = "before" if task.index == 0 else way
            trainer = page["trainer"](known, texts, model=model, callbacks=[callback])
            callback.attach(trainer)
            start = [p.detach().clone() for p in model.parameters()]
            trainer.train()
        pairs = zip(start, model.parameters(), strict=True)
        return sum(float((p - before).detach().square().sum()) for before, p in pairs)

    assert 0 < moved(1e6) < 0.8 * moved(0.0)


@pytest.mark.slow
def test_the_docs_in_two_processes(tmp_path):
    script = tmp_path / "script.py"
    check = """
from accelerate.utils import gather_object

found = gather_object([[p.detach().clone() for p in model.parameters()]])
memory = gather_object([guard.strategy.memory])
assert len(found) == 2
assert all(torch.equal(a, b) for a, b in zip(*found))
assert all(torch.equal(memory[0][k], memory[1][k]) for k in memory[0])
rows = {k: v for k, v in guard.strategy.rows_per_sample.items()}
assert set(rows.values()) == {1.0}
"""
    script.write_text(SNIPPETS[ABOUT.index("accelerate")] + check)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    found = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, check=False
    )
    assert found.returncode == 0, found.stderr[-3000:]
