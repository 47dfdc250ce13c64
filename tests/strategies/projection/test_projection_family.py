"""What SGP, TRGP, ROGO and Adam-NSCL share: W does not move inside the memory; kills; options."""

import functools
import sys

import pytest
import torch
from dying import noisy
from family import (
    NETWORKS,
    OPTIMIZERS,
    assert_orthonormal,
    make,
    matrices,
    relaxed,
    same_weights,
    setting,
    sgd,
)
from lightning import Trainer
from torch.optim import SGD
from toys import accuracy, learn, learn_stream, make_engine, make_learner, make_stream, mlp, weights

from cl_bench.contracts import Plan, UsageError
from cl_bench.experiment import (
    AlignmentSettings,
    CheckpointSettings,
    EvalSettings,
    Identity,
    LoopSettings,
    conduct,
)
from cl_bench.learners import Classifier
from cl_bench.models import AlexNetCL, LeNet, ResNet18Small
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.projection.adam_nscl import AdamNSCL
from cl_bench.strategies.projection.rogo import ROGO
from cl_bench.strategies.projection.sgp import SGP
from cl_bench.strategies.projection.trgp import TRGP
from cl_bench.subspace import confinement
from runs import differences, final_weights


def leak(change, basis):
    return float((change @ basis.double()).norm()) / max(float(change.norm()), 1e-300)


# -- what all of them keep: W does not move inside the memory --------------------------------------


TASKS = {"sgp": "domain", "trgp": "task", "rogo": "domain", "adam_nscl": "domain"}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["trgp", "adam_nscl"])
def test_no_change_inside_the_memory_and_the_new_task_is_learned(name, network, optimizer):
    stream, learner = setting(network, OPTIMIZERS[optimizer], tasks=2)
    strategy = make(name, network)
    learn(learner, strategy, stream[0], epochs=10)
    for task in stream.tasks[1:]:
        memory = dict(strategy.occupied if name == "adam_nscl" else strategy.memory)
        before, naive = matrices(learner), accuracy(learner, task)
        learn(learner, strategy, task, epochs=25)
        for layer, after in matrices(learner).items():
            change, M = after - before[layer], memory[layer]
            assert_orthonormal(M)
            assert M.shape[1] < M.shape[0]
            assert float(change.norm()) > 1e-3, layer
            assert leak(change, M) < 1e-4, layer
        assert sum(M.shape[1] > 0 for M in memory.values()) >= len(memory) / 2
        assert reached(learner, strategy, task) > naive + 0.15


def reached(learner, strategy, task):
    with strategy.inference(learner, task):
        return accuracy(learner, task)


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "weight decay"])
def test_projecting_only_the_gradient_leaks(optimizer):
    stream, learner = setting("mlp", OPTIMIZERS[optimizer])
    strategy = TRGP(threshold=0.8, samples=40)
    strategy.place = lambda learner: "gradient"  # which options refuse
    learn(learner, strategy, stream[0], epochs=10)
    before, memory = matrices(learner), dict(strategy.memory)
    learn(learner, strategy, stream[1], epochs=10)
    after = matrices(learner)
    assert max(leak(after[n] - before[n], M) for n, M in memory.items()) > 1e-2


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ["sgp", "trgp", "rogo"])
def test_memories_only_grow(name, network):
    stream, learner = setting(network)
    strategy = make(name, network)
    old = {}
    for task in stream:
        learn(learner, strategy, task, epochs=3)
        for layer, M in strategy.memory.items():
            assert_orthonormal(M)
            if layer in old:
                k = old[layer].shape[1]
                assert torch.equal(M[:, :k], old[layer])
                assert M.shape[1] <= M.shape[0]
        old = dict(strategy.memory)


@pytest.mark.parametrize("name", ["sgp", "trgp", "rogo"])
def test_without_a_memory_they_are_plain_sgd(name):
    finetuned, learner = (setting("mlp", optimizer=sgd, n=30)[1] for _ in range(2))
    stream = make_stream(n=30)
    learn_stream(finetuned, Finetune(), stream, epochs=2)
    strategy = make(name, threshold=1e-9)
    for task in stream:
        learn(learner, strategy, task, epochs=2)
        assert all(M.shape[1] == 0 for M in strategy.memory.values()) or task.index > 0
        strategy.memory = {layer: M[:, :0] for layer, M in strategy.memory.items()}
        if name == "sgp":
            strategy.importance = {layer: v[:0] for layer, v in strategy.importance.items()}
        if name == "trgp":
            strategy.subspaces = {layer: [B[:, :0]] for layer, B in strategy.memory.items()}
    assert same_weights(finetuned, learner)


def test_a_full_memory_leaves_nothing_to_move():
    stream, learner = setting("mlp")
    strategy = TRGP(threshold=1.0, samples=40, rank_rule="energy", trust=1.0)
    learn(learner, strategy, stream[0], epochs=3)
    strategy.memory = {n: torch.eye(len(M)).double() for n, M in strategy.memory.items()}
    before = weights(learner)
    learn(learner, strategy, stream[1], epochs=3)
    after = weights(learner)
    assert all(float((after[n] - before[n]).abs().max()) < 1e-6 for n in before)


# -- state, and going on in the middle of a task ---------------------------------------------------


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


def conducted(
    directory,
    strategy,
    optimizer,
    *,
    model=mlp,
    pack=1,
    scenario="domain",
    dies_at=-1,
    resume=False,
):
    stream = make_stream(scenario, n=44)
    learner = Mortal(stream, model(), optimizer, 10, 0, pack)
    learner.dies_at = dies_at
    trainer = functools.partial(
        Trainer,
        accelerator="cpu",
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    made = strategy()
    conduct(
        stream,
        made,
        learner,
        trainer,
        Identity("toy", "strategy", "seed: 0\n", "python -m cl_bench"),
        loop=LoopSettings(0, 10, pack),
        evaluation=EvalSettings(),
        alignment=AlignmentSettings(samples=20, batches=2),
        checkpoint=CheckpointSettings(every_steps=3),
        run_dir=directory,
        resume=resume,
    )
    return learner, made


small = {"samples": 20}
rogo = functools.partial(ROGO, threshold=0.97, cosine=0.5, strength=0.1, **small)
trgp = functools.partial(TRGP, threshold=0.8, trust=0.1, **small)
RESUMED = {
    "sgp": (functools.partial(SGP, threshold=0.8, **small), "SGD", {}),
    "sgp-packed": (functools.partial(SGP, threshold=0.8, **small), "SGD", {"pack": 2}),
    "trgp": (trgp, "momentum", {"scenario": "task"}),
    "trgp-quirks-packed": (
        functools.partial(trgp, official_quirks=True),
        "AdamW",
        {"scenario": "task", "pack": 2},
    ),
    "rogo": (rogo, "SGD", {}),
    "rogo-quirks-packed": (
        functools.partial(rogo, official_quirks=True),
        "Adam",
        {"pack": 2, "model": noisy},
    ),
    "adam_nscl": (
        functools.partial(AdamNSCL, 50.0, official_scale=True),
        "Adam",
        {"model": noisy},
    ),
}


@pytest.mark.parametrize("place", ["as it comes", "inputs"])
@pytest.mark.parametrize("case", RESUMED)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch, case, place):
    monkeypatch.setattr(
        sys.modules["cl_bench.experiment.conduct"], "write_figures", lambda directory: []
    )
    if place == "inputs":
        monkeypatch.setattr(confinement, "WORTHWHILE", 0)
    strategy, optimizer, options = RESUMED[case]
    options |= {"strategy": strategy, "optimizer": OPTIMIZERS[optimizer]}
    learner, made = conducted(tmp_path / "whole", **options)
    if isinstance(made, ROGO):
        assert sum(q for q, _ in made.turned.values()) > 0
    if isinstance(made, TRGP):
        assert any(made.region.values())
    for moment in (0.45, 0.72, 0.9, 0.97):
        directory = tmp_path / f"at-{moment}"
        with pytest.raises(Killed):
            conducted(directory, dies_at=int(moment * learner.batches), **options)
        conducted(directory, resume=True, **options)
        assert differences(tmp_path / "whole", directory) == []
        assert final_weights(tmp_path / "whole") == final_weights(directory)


# -- options ---------------------------------------------------------------------------------------


WRONG = {
    "sgp-scale": (lambda: SGP(scale=-1), r"strategy\.scale=-1"),
    "sgp-threshold": (lambda: SGP(threshold=1.5), r"strategy\.threshold=1\.5"),
    "trgp-trust": (lambda: TRGP(trust=1.5), r"strategy\.trust=1\.5"),
    "trgp-regions": (lambda: TRGP(regions=0), r"strategy\.regions=0"),
    "trgp-samples": (lambda: TRGP(trust_samples=0), r"strategy\.trust_samples=0"),
    "rogo-cosine": (lambda: ROGO(cosine=0), r"strategy\.cosine=0"),
    "rogo-gradient": (lambda: ROGO(gradient_threshold=2), r"strategy\.gradient_threshold=2"),
    "rogo-schedule": (lambda: ROGO(schedule="never"), r"strategy\.schedule=never: use epoch or"),
    "rogo-representation": (lambda: ROGO(representation="x"), r"strategy\.representation=x"),
    "rogo-strength": (lambda: ROGO(strength=-1), r"strategy\.strength=-1"),
    "rogo-rounds": (lambda: ROGO(rounds=0), r"strategy\.rounds=0"),
    "rogo-samples": (lambda: ROGO(relax_samples=0), r"strategy\.relax_samples=0"),
    "rogo-rate": (lambda: ROGO(rate_factor=0), r"strategy\.rate_factor=0"),
    "nscl-a": (lambda: AdamNSCL(a=0.5), r"strategy\.a=0\.5"),
    "nscl-samples": (lambda: AdamNSCL(samples=0), r"strategy\.samples=0"),
    "nscl-rate": (lambda: AdamNSCL(head_rate=0), r"strategy\.head_rate=0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_name_the_value(case):
    make_wrong, message = WRONG[case]
    with pytest.raises(UsageError, match=message):
        make_wrong()


def test_thresholds_that_fit_no_layer_are_named_by_their_option():
    stream, learner, rogo, _ = relaxed()
    rogo.cosine = [0.9]
    with pytest.raises(UsageError, match=r"strategy\.cosine=\[0\.9\] has 1 entries, but 3 layers"):
        learner.begin(stream[1], rogo)


# -- the papers' networks --------------------------------------------------------------------------


PAPERS = {
    "alexnet": (functools.partial(AlexNetCL, width=64), 64, 5),
    "lenet": (functools.partial(LeNet, widths=(40, 30)), 30, 4),
    "resnet": (functools.partial(ResNet18Small, nf=4), 128, 20),
    "resnet strided": (functools.partial(ResNet18Small, nf=4, stem_stride=2), 32, 20),
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("network", ["alexnet", "resnet"])
def test_every_strategy_learns_on_the_papers_networks(name, network):
    stream = make_stream("task", tasks=2, n=24, shape=(3, 32, 32), subspace=6)
    model = PAPERS[network][0]((3, 32, 32))
    learner = make_learner(stream, model, functools.partial(SGD, lr=0.02), batch_size=12)
    options = {"threshold": 0.7, "samples": 8} if name != "adam_nscl" else {}
    strategy = make(name, **options)
    engine = make_engine(learner, strategy, epochs=2, batch_size=12)
    before = weights(learner)
    for task in stream:
        layers = engine.learn(task, Plan(task.train))
    assert all("rank" in row for row in layers.values())
    after = weights(learner)
    assert float((after["backbone.conv1.weight"] - before["backbone.conv1.weight"]).norm()) > 0
