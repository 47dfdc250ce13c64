"""Where seams of the contract meet: phases beside companions, modules that others must not see."""

import copy
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import laws
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cases import Setting
from omegaconf import OmegaConf
from seams import Part
from torch import nn
from toys import WIDTH, Silent, make_engine, make_learner, make_stream, mlp, weights

import cl_bench.cli.export as exporting
from cl_bench.contracts import Loss, Phase, Plan, Protect, Strategy, UsageError
from cl_bench.experiment import LoopSettings, Together
from cl_bench.experiment.checks import check_epochs
from cl_bench.experiment.plateau import Cosine
from cl_bench.experiment.probes.landscape import LandscapeSettings, LossLandscape
from cl_bench.experiment.probes.unprotected import UnprotectedSettings, UnprotectedUpdate
from cl_bench.experiment.probes.updates import UpdateAngles, UpdateSettings
from cl_bench.experiment.weights import read_weights
from cl_bench.strategies import EWC, GPM, NCM, TaskVector


class Line(Strategy):
    """Two numbers of its own, learned in a phase on the first ``samples`` of the task."""

    def __init__(self, samples=40):
        self.samples = samples
        self.consolidated = 0

    def modules(self, learner):
        return {"line": nn.Linear(1, 1)}

    def setup(self, learner, task):
        learner.hold(learner.extras(self).values())
        self.before = {}

    def phases(self, learner, task):
        self.before = self.before or {k: b.clone() for k, b in learner.named_buffers()}
        data = Part(task.train, torch.arange(self.samples))
        return [Phase("line", data, 1, self.groups, self.line_loss)]

    def groups(self, learner):
        return [{"params": learner.extras(self).parameters()}]

    def line_loss(self, learner, batch, out):
        line = learner.extras(self)["line"]
        out = out * line.weight + line.bias
        return Loss(F.cross_entropy(out, batch["y"], reduction="sum"), len(out))

    def consolidate(self, learner, task, stats):
        self.consolidated += 1


class Head(Line):
    """The same, of the output layer."""

    def groups(self, learner):
        return [{"params": learner.heads.parameters()}]

    line_loss = None


def normed(affine=True):
    return nn.Sequential(mlp(), nn.BatchNorm1d(WIDTH, affine=affine))


def run(strategy, model=None, tasks=1, **options):
    """Learn the first tasks; returns learner, engine and stream."""
    stream = make_stream()
    learner = make_learner(stream, model)
    engine = make_engine(learner, strategy, **options)
    for t in range(tasks):
        engine.learn(stream[t], strategy.plan(stream, t))
    return learner, engine, stream


def test_a_companions_statistics_are_of_the_task_and_not_of_a_phase():
    alone, beside = EWC(samples=10), EWC(samples=10)
    run(alone)
    run(Together({"ewc": beside, "line": Line()}))
    for name, information in alone.information.items():
        torch.testing.assert_close(beside.information[name], information, rtol=1e-5, atol=1e-9)
    assert all(information.any() for information in alone.information.values())


def test_a_companion_takes_back_what_the_task_trained():
    strategy = Together({"back": TaskVector(alpha=1.0), "line": Line()})
    learner, engine, stream = run(strategy)
    before = weights(learner)
    engine.learn(stream[1], strategy.plan(stream, 1))
    for name, weight in weights(learner).items():
        if not name.startswith("extra."):
            assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("affine", [True, False])
def test_a_phase_leaves_the_statistics_of_what_it_does_not_train(affine):
    strategy = Line()
    learner, engine, stream = run(strategy, normed(affine))
    after = dict(learner.named_buffers())
    assert len(strategy.before) > 1
    assert all(torch.equal(after[k], b) for k, b in strategy.before.items())
    assert not learner.held_norms
    moved = strategy.before["backbone.1.running_mean"]
    engine.learn(stream[1], strategy.plan(stream, 1))  # and they follow the next task
    assert not torch.equal(strategy.before["backbone.1.running_mean"], moved)


def test_a_phase_of_the_whole_network_moves_its_statistics():
    strategy = Line()
    strategy.groups = lambda learner: [{"params": learner.parameters()}]
    learner, _, _ = run(strategy, normed(affine=False))
    moved = dict(learner.named_buffers())["backbone.1.running_mean"]
    assert not torch.equal(moved, strategy.before["backbone.1.running_mean"])


def test_a_phase_without_samples_is_refused_and_not_skipped():
    strategy = Line(samples=0)
    with pytest.raises(UsageError, match=r"task 't0', phase 'line': .* trains on 0 samples"):
        run(strategy)
    assert strategy.consolidated == 0


@pytest.mark.parametrize(("samples", "fits"), [(1, False), (11, True)])
def test_a_phase_of_one_sample_meets_no_batch_normalisation(samples, fits):
    strategy = Head(samples)
    if fits:  # the lone sample joins the batch of 10
        run(strategy, normed())
        assert strategy.consolidated == 1
        return
    with pytest.raises(UsageError, match=r"trains on 1 samples, and a batch needs 2"):
        run(strategy, normed())


class Growing(Strategy):
    """A table and a linear map more with every task, and none of the first task's."""

    tasks = 0

    def modules(self, learner):
        made = {f"table{t}": nn.Embedding(3, 4) for t in range(self.tasks + 1)}
        made |= {f"map{t}": nn.Linear(3, 4) for t in range(self.tasks + 1)}
        return {name: module for name, module in made.items() if name != f"map{self.tasks - 1}"}

    def consolidate(self, learner, task, stats):
        self.tasks += 1


def test_a_companion_freezes_no_table_that_is_anothers():
    growing = Growing()
    strategy = Together({"gpm": GPM(), "growing": growing})
    learner, _, stream = run(strategy)
    learner.begin(stream[1], strategy)
    assert all(p.requires_grad for p in learner.extras(growing).parameters())
    assert not any(name.startswith("extra.") for name in learner.guarded(Protect()))


@pytest.mark.parametrize(
    "make",
    [
        lambda stream: UpdateAngles(UpdateSettings(enabled=True), [0, 1]),
        lambda stream: UnprotectedUpdate(UnprotectedSettings(enabled=True)),
        lambda stream: LossLandscape(LandscapeSettings(enabled=True), [0, 1], stream, Silent(), 0),
    ],
)
def test_probes_bear_modules_that_come_and_go(make):
    strategy = Growing()
    learner, _, stream = run(strategy)
    probe = make(stream)
    learner.begin(stream[1], strategy)
    probe.before_task(learner, stream[1])
    probe.after_step(learner, stream[1], 1, 0.1)
    with torch.no_grad():
        learner.heads[0].weight.add_(1.0)
    strategy.consolidate(learner, stream[1], {})
    learner.equip(strategy)
    before = weights(learner)
    found = probe.after_task(learner, stream[1])
    assert not any(layer.startswith("extra.") for layer in found)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(learner).items())


def test_making_modules_leaves_all_random_numbers_alone(monkeypatch):
    learner = make_learner(make_stream())
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(3)
    expected, seeded[:] = torch.rand(4), []
    torch.default_generator.manual_seed(3)
    learner.equip(Growing())
    assert torch.equal(torch.rand(4), expected)
    assert seeded == []


def test_a_copy_in_the_middle_of_a_test_is_in_none():
    class Copying(Strategy):
        @contextmanager
        def inference(self, learner, task):
            yield

        def predict(self, learner, batch, task):
            self.copied = copy.deepcopy(learner._step)
            assert learner._step.loader == 0
            return learner(batch)

    strategy = Copying()
    learner, engine, stream = run(strategy, tasks=0)
    engine.evaluate([stream[0]], 40, None)
    assert strategy.copied.loader is None
    assert strategy.copied.inside is not learner._step.inside


def test_an_evaluation_that_fails_leaves_inference():
    open_now = []

    class Failing(Strategy):
        @contextmanager
        def inference(self, learner, task):
            open_now.append(task)
            yield
            open_now.pop()

        def predict(self, learner, batch, task):
            raise UsageError("no answer")

    _, engine, stream = run(Failing(), tasks=0)
    with pytest.raises(UsageError, match="no answer"):
        engine.evaluate([stream[0]], 10, None)
    assert open_now == []


@pytest.mark.parametrize(("strategy", "refused"), [(NCM, True), (EWC, False)])
def test_what_a_strategy_answers_itself_is_not_exported_as_the_networks(
    strategy, refused, monkeypatch
):
    monkeypatch.setattr(exporting, "locate", lambda *_: strategy)
    cfg = OmegaConf.create({"strategy": {"_target_": "named"}})
    run = SimpleNamespace(cfg=cfg, directory="r", trust=SimpleNamespace(importable=nullcontext))
    exporting.require_one_network(SimpleNamespace(word="export", run=run, learned=0))
    says = pytest.raises(UsageError, match=r"NCM \(strategy\) answers at test itself")
    with says if refused else nullcontext():
        exporting.require_one_network(SimpleNamespace(word="export", run=run, learned=1))


def test_exported_weights_with_modules_of_a_strategy_are_no_program(tmp_path, monkeypatch):
    learner, _, _ = run(Growing())
    monkeypatch.setattr(exporting, "heads_section", lambda *_: "")
    order = SimpleNamespace(data={"tasks": [{"head": 0}]}, learned=1)
    said = exporting._write(order, learner.weights(), tmp_path)
    kept = read_weights(tmp_path / "model.safetensors")
    assert {k: v.shape for k, v in kept.items()} == {
        k: v.shape for k, v in learner.weights().items()
    }
    assert "modules of Growing beside the network's" in said


def test_a_killed_run_records_the_rate_that_its_epoch_began_with(tmp_path, monkeypatch):
    begin = Setting.__init__

    def annealed(self, name, **options):
        begin(self, name, **options)
        self.schedule = Cosine()
        self.loop = LoopSettings(0, self.batch, self.pack, schedule=self.schedule)

    monkeypatch.setattr(Setting, "__init__", annealed)
    laws.kill_and_resume("Corrected", tmp_path)


def test_epochs_of_a_plan_are_those_that_a_companion_needs(monkeypatch):
    stream = make_stream()
    strategy = Together({"ncm": NCM(), "back": TaskVector(epoch=2)})
    with pytest.raises(UsageError, match=r"strategy\.epoch=2: task 't0' has 0 epochs"):
        check_epochs(strategy, stream, 5)
    monkeypatch.setattr(NCM, "plan", lambda self, stream, t: Plan(stream[t].train, 3))
    check_epochs(strategy, stream, 1)
