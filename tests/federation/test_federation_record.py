"""What a federation records, and how it goes on after a kill."""

import functools
import itertools
import json

import pytest
import torch
from federations import fot_local, learn
from torch import nn
from torch.optim import SGD, Adam
from toys import DIM, make_learner, make_stream

from cl_bench.experiment import (
    AlignmentSettings,
    CheckpointSettings,
    EvalSettings,
    Identity,
    LoopSettings,
    conduct,
)
from cl_bench.federation import FederatedEngine, Federation
from cl_bench.federation.fairness import client_forgetting, client_scores
from cl_bench.learners import Classifier
from cl_bench.strategies.federated.fot import FOT
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.replay.er import ER
from cl_bench.tracking import read_results
from runs import differences, final_weights

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_scores_of_clients_follow_their_classes():
    counts = torch.tensor([[10, 0], [5, 5], [0, 0]])
    first = client_scores(counts, torch.tensor([0.9, 0.5]).double())
    assert first[:2].tolist() == pytest.approx([0.9, 0.7])
    assert first[2].isnan()
    now = client_scores(counts, torch.tensor([0.4, 0.5]).double())
    newest = torch.tensor([1.0, 1.0, 1.0]).double()
    lost = client_forgetting({0: first, 1: newest}, {0: now, 1: newest}, last=1)
    assert lost[:2].tolist() == pytest.approx([0.5, 0.25])
    assert lost[2].isnan()


class Killed(BaseException):
    """The process is gone."""


class Mortal(Classifier):
    """Dies before the ``dies_at``-th batch."""

    dies_at = -1
    batches = 0

    def _learn(self, batch):
        if self.batches == self.dies_at:
            raise Killed
        self.batches += 1
        return super()._learn(batch)


def noisy():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(DIM, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 16)
    )


def whole_run(directory, strategy, *, dies_at=-1, resume=False, every=1, **options):
    stream = make_stream(n=60)
    optimizer = functools.partial(SGD, lr=0.05, momentum=0.9)
    learner = Mortal(stream, noisy(), optimizer, 10, 0, 1, True)
    learner.dies_at = dies_at
    settings = {"clients": 6, "per_round": 3, "rounds": 3, "drop_outs": 0.2, **options}
    conduct(
        stream,
        strategy(),
        learner,
        None,
        Identity("toy", "strategy", "seed: 0\n", "python -m cl_bench"),
        loop=LoopSettings(0, 10),
        evaluation=EvalSettings(),
        alignment=AlignmentSettings(samples=20, batches=2),
        checkpoint=CheckpointSettings(True, every, 2),
        run_dir=directory,
        resume=resume,
        engine=functools.partial(FederatedEngine, federation=Federation(**settings)),
    )
    return learner


RESUMED = {
    "fot": (FOT, {"server": functools.partial(Adam, lr=0.01)}),
    "fot as published": (fot_local, {"statistics": "sampled"}),
    "ewc": (functools.partial(EWC, samples=10), {"partition": "shards"}),
    "er": (functools.partial(ER, memory=8), {"participation": 0.75}),
}
IGNORE = ("client_seconds", "federation")


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_killed_in_any_round_goes_on_bit_for_bit(tmp_path, case, monkeypatch):
    monkeypatch.setattr(FederatedEngine, "figures", lambda self, directory: [])
    strategy, options = RESUMED[case]
    learner = whole_run(tmp_path / "whole", strategy, **options)
    for dies_at in range(1, learner.batches, 7):
        killed = tmp_path / f"killed-{dies_at}"
        with pytest.raises(Killed):
            whole_run(killed, strategy, dies_at=dies_at, **options)
        whole_run(killed, strategy, resume=True, **options)
        assert differences(tmp_path / "whole", killed, IGNORE) == []
        one, other = final_weights(tmp_path / "whole"), final_weights(killed)
        assert {k: v for k, v in one.items() if "seconds" not in k} == {
            k: v for k, v in other.items() if "seconds" not in k
        }


def test_heads_of_tasks_to_come_are_guarded_before_they_learn():
    """The one head of a class-incremental stream reads the same features, in parts yet unseen."""
    stream = make_stream("class", tasks=2, n=60)
    learner, strategy = make_learner(stream), FOT(eps=0.9)
    tasks = learn(learner, strategy, stream)
    next(tasks)
    bases = {i: strategy.basis[f"heads.{i}"] for i in (0, 1)}
    assert torch.equal(bases[0] @ bases[0].t(), bases[1] @ bases[1].t())
    before = [head.weight.detach().clone() for head in learner.heads]
    next(tasks)
    for i, head in enumerate(learner.heads):
        change = (head.weight - before[i]).detach()
        assert change.norm() > 1e-3
        assert (change @ bases[i].to(change)).norm() < 1e-4 * change.norm()


def test_traffic_is_what_the_shapes_say(tmp_path):
    whole_run(tmp_path / "run", FOT, drop_outs=0.0)
    events = read_results(tmp_path / "run")
    model = 4 * (12 * 16 + 16 + 2 * 16 + 2 * 16 + 16 * 16 + 16 + 16 * 3 + 3)
    rounds = [e for e in events if e["event"] == "round"]
    assert [(e["task"], e["round"]) for e in rounds] == list(itertools.product(range(3), [1, 2, 3]))
    for e in rounds:
        assert e["bytes_down"] == 3 * model
        held = 4 * 2 * 16 if e["task"] else 0  # normalisation is frozen after the first task
        assert e["bytes_up"] == 3 * (model - held + 3 * 8)  # weight, loss and steps beside it
    widths = (13, 17, 17)  # one more each: biases are in the matrix
    layers = {e["task"]: e["layers"] for e in events if e["event"] == "layers"}
    for e in [e for e in events if e["event"] == "federation"]:
        numbers = sum(d * (d + 1) // 2 + 2 for d in widths) + 1
        assert e["statistics_up"] == 6 * 8 * numbers
        before = layers.get(e["task"] - 1, {})
        held = [v["rank"] for v in before.values() if "rank" in v]
        memory = sum(d * k for d, k in zip(widths, held, strict=False))
        assert e["memory_down"] == 6 * 8 * memory
    clients = [e for e in events if e["event"] == "clients"]
    assert [len(e["forgetting"]) for e in clients] == [6, 6, 6]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["federation"]["model_up"] == sum(e["bytes_up"] for e in rounds)
    assert (tmp_path / "run" / "partition.png").stat().st_size > 1000


def test_a_layer_that_fills_up_is_announced(tmp_path, capsys):
    whole_run(tmp_path / "run", functools.partial(FOT, eps=1.0), rounds=1)
    said = capsys.readouterr().out
    assert "warning: layer backbone.0 is full" in said
    assert "lower strategy.eps" in said
