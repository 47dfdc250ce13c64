"""Biographies through the engine and the command line."""

import functools
import json
from pathlib import Path

import hydra
import pytest
import torch
from biographies import _Trainer, make_causal, make_model, world
from torch.optim import SGD
from toys import Silent

from cl_bench.cli.run import run_config
from cl_bench.contracts import LanguageStream, Origin, Plan, Task
from cl_bench.data import MemoryData
from cl_bench.experiment import LightningEngine, LoopSettings
from cl_bench.learners import Causal
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.tracking import read_results

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]


class Sized(Task):
    """A task that says how long and how fast it is learned."""

    def __init__(self, index, epochs, rate):
        self.name, self.index, self.head, self.classes = f"s{index}", index, 0, range(20)
        self.origin = Origin("generated", "none", "none")
        self.epochs, self.rate = epochs, rate
        tokens = torch.randint(2, 20, (16, 6))
        self.data = MemoryData(
            {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
        )

    @property
    def train(self):
        return self.data

    validation = test = train


def test_a_task_decides_its_epochs_and_scales_the_rate():
    stream = LanguageStream(
        "sized",
        [Sized(0, 3, 0.5), Sized(1, None, 1.0)],
        6,
        "sized",
        vocabulary=[str(i) for i in range(20)],
        end=1,
        pad=0,
    )
    rates = []

    class Heard(Silent):
        def epoch(self, *args, **fields):
            if fields:
                rates.append((fields["task"], fields["learning_rate"]))

    model = make_model(vocabulary=20)
    learner = Causal(stream, model, functools.partial(SGD, lr=0.1), batch_size=8, seed=0)
    trainer = functools.partial(_Trainer().__call__, max_epochs=2)
    engine = LightningEngine(
        learner, Finetune(), trainer, LoopSettings(0, 8), None, Heard(), Silent()
    )
    for task in stream:
        engine.learn(task, Plan(task.train))
    assert rates == [(0, 0.05)] * 3 + [(1, 0.1)] * 2
    scores = engine.evaluate(list(stream), 100, None)
    assert set(scores) == {"s0", "s1"}
    assert set(engine.details["s0"]) == {"first_token", "first_token_probability"}


def test_probes_are_scored_beside_the_matrix():
    stream, learner = world(), make_causal()
    engine = LightningEngine(
        learner, Finetune(), _Trainer(), LoopSettings(0, 8), None, Silent(), Silent()
    )
    scores = engine.evaluate(list(stream), 7, None)
    assert set(scores) == {"read_about", "new_1"}
    found = engine.details["read_about"]
    assert {"biography", "control", "biography/first_token", "type_rate"} <= set(found)
    assert "biography" not in engine.details["new_1"]
    batch = stream[0].test[torch.arange(len(stream[0].test))]
    learner.eval()
    first = learner.details(learner(batch), batch)["first_token"]
    assert found["first_token"] == pytest.approx(float(first.mean()))
    assert learner.performance(batch) == pytest.approx(scores["read_about"])


def test_smoke_tier_from_the_command_line(cli, cache, tmp_path):
    """Two strategies: the second takes the first one's checkpoint, and both start from row 0."""
    rows, sources = [], []
    for strategy in ("finetune", "freeze"):
        run = (f"+strategy={strategy}", "+stream=biography/smoke", f"run_dir={strategy}")
        status, _, err = cli(*run, "logger.mode=disabled")
        assert status == 0, err
        events = read_results(tmp_path / strategy)
        (read,) = [e for e in events if e.get("status") == "pretrained"]
        sources.append(read["from_cache"])
        evaluations = [e for e in events if e["event"] == "evaluation"]
        assert [e["row"] for e in evaluations] == [0, 1, 2]
        rows.append(evaluations[0]["details"])
        assert {"biography", "control", "type_rate"} <= set(evaluations[2]["details"]["read_about"])
        data = json.loads((tmp_path / strategy / "data.json").read_text())
        assert data["tasks"][0]["facts"]["floors"]["exact_match"]["mean"] < 0.2
    assert sources == [False, True]
    assert rows[0] == rows[1]
    assert rows[0]["read_about"]["biography/type_rate"] > 0.9  # it did read


@pytest.mark.parametrize("strategy", ["gpm", "rogo", "er", "task_vector"])
def test_strategies_run_on_biographies_as_configured(strategy, tmp_path, monkeypatch):
    """Their own configuration, on the smoke tier cut down, with everything that can be probed."""
    monkeypatch.setenv("CL_BENCH_CACHE", str(tmp_path / "cache"))
    probed = [f"probe.{p}.enabled=true" for p in ("updates", "features", "recovery", "landscape")]
    if strategy in ("gpm", "rogo"):
        probed.append("strategy.protect.embeddings=free")
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = hydra.compose(
            "config",
            [
                *(f"+strategy={strategy}", "+stream=biography/smoke", "logger.mode=disabled"),
                *("stream.people=40", "stream.new_people=20", "stream.epochs=[1,5]"),
                *("stream.pretrain.steps=10", "eval.dense=[0,2]", "probe.early=[0,2]"),
                *("probe.landscape.along_early=[0,1,2]", "probe.landscape.along_late=[0,1,2]"),
                *("probe.recovery.steps=2", "trainer.accelerator=cpu", *probed),
                f"run_dir={tmp_path / 'run'}",
            ],
        )
    result = run_config(cfg, "python -m cl_bench", {"strategy": strategy})
    assert result.matrix.shape == (3, 2)
    found = {e["probe"] for e in read_results(tmp_path / "run") if e["event"] == "probe"}
    assert found == {"curve", "dynamics", "alignment", "landscape", "cost"}
    layers = [e["layers"] for e in read_results(tmp_path / "run") if e["event"] == "layers"]
    block, embedding = layers[1]["backbone.layers.0"], layers[1]["backbone.embed_in"]
    assert 0 <= block["feat/read_about/task/pc_angle"] <= 90
    # Every prompt ends with the same token: its embedding may move, and varies in no direction.
    assert layers[1]["embeddings"]["feat/read_about/early/shift"] > 0
    assert layers[1]["embeddings"]["feat/read_about/early/pc_angle"] is None
    assert 0 <= embedding["wupd/previous-task/theta_mean"] <= 90
    assert (tmp_path / "run/curve.png").exists()
    assert (tmp_path / "run/landscape_2.png").exists()
