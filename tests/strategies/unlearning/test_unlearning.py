"""Requests to forget: outside the matrix, exact by ridge, and behind a gate to the bit."""

import functools
import json
import sys

import pytest
import torch
from biographies import WORLD, make_causal
from lightning import Trainer
from toys import Silent, make_learner

from cl_bench.contracts import UsageError
from cl_bench.experiment import (
    AlignmentSettings,
    CheckpointSettings,
    EvalSettings,
    Identity,
    LightningEngine,
    LoopSettings,
    check_pair,
    conduct,
)
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.unlearning.gradient_ascent import GradientAscent
from cl_bench.strategies.unlearning.o3 import O3
from cl_bench.strategies.unlearning.relabel import Relabel
from cl_bench.strategies.unlearning.relabelled import relabelled
from cl_bench.strategies.unlearning.ridge_unlearning import RidgeUnlearning
from cl_bench.tasks.biography import UnlearnBiography
from cl_bench.tasks.unlearn_digits import UnlearnDigits

trainer = functools.partial(
    Trainer, accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    return UnlearnDigits(forgotten=(0, 3))


def mlp(stream):
    from cl_bench.models import MLP

    torch.manual_seed(1)
    return make_learner(stream, MLP((1, 8, 8), (32,), True), batch_size=20)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    module = sys.modules["cl_bench.experiment.conduct"]
    monkeypatch.setattr(module, "write_figures", lambda directory: [])


def test_requests_are_no_columns_and_their_scores_stand_beside(digits, tmp_path):
    result = conduct(
        digits,
        Relabel(),
        mlp(digits),
        functools.partial(trainer, max_epochs=3),
        Identity("toy", "relabel", "seed: 0\n", "python -m cl_bench"),
        loop=LoopSettings(0, 20),
        evaluation=EvalSettings(),
        alignment=AlignmentSettings(enabled=False),
        checkpoint=CheckpointSettings(enabled=False),
        run_dir=tmp_path / "run",
    )
    assert result.matrix.shape == (2, 1)
    events = [json.loads(x) for x in (tmp_path / "run/results.jsonl").read_text().splitlines()]
    told = [e for e in events if e["event"] == "forget"]
    assert [(e["request"], e["task"]) for e in told] == [(0, 0), (1, 1), (2, 2)]
    assert told[0]["scores"] == {"digits": result.matrix[1, 0]}
    assert set(told[0]["forgotten"]) == {"forget_0", "forget_3"}
    assert told[0]["forgotten"]["forget_0"] > 0.7
    assert told[1]["forgotten"]["forget_0"] < 0.2
    utility = [e["scores"]["digits"] for e in told]
    assert result.summary["utility_after_requests"] == utility
    assert result.summary["forget_quality"] > 0.7
    assert result.summary["retained_utility"] == pytest.approx(utility[-1] / utility[0])
    assert result.summary["tasks_learned"] == 1


def learned(strategy, stream, learner, epochs=1, batch=20):
    engine = LightningEngine(
        learner, strategy, functools.partial(trainer, max_epochs=epochs), LoopSettings(0, batch),
        None, Silent(), Silent(),
    )  # fmt: skip
    for t, task in enumerate(stream):
        engine.learn(task, strategy.plan(stream, t))
    return engine


def test_ridge_forgets_as_if_the_samples_had_never_come(digits):
    strategy, learner = RidgeUnlearning(), mlp(digits)
    learned(strategy, digits, learner)
    batch = digits[0].train[torch.arange(len(digits[0].train))]
    kept = ~torch.isin(batch["y"], torch.tensor([0, 3]))
    with torch.no_grad(), learner.evaluating():
        z = learner.features({k: v[kept] for k, v in batch.items()}).double()
    y = torch.nn.functional.one_hot(batch["y"][kept], 10).double()
    wanted = torch.linalg.solve(z.t() @ z + torch.eye(z.shape[1]).double(), z.t() @ y)
    torch.testing.assert_close(strategy.beta, wanted, rtol=0, atol=1e-8)


def test_ascent_climbs_to_its_limit_and_learns_other_tasks(digits):
    strategy, learner = GradientAscent(limit=2.0), mlp(digits)
    batch = digits[0].train[torch.arange(50)]
    strategy.setup(learner, digits[0])
    own = learner.total_loss(learner(batch), batch)
    assert float(strategy.objective(learner, batch, learner(batch)).sum.detach()) == float(
        own.sum.detach()
    )
    strategy.setup(learner, digits[1])
    assert float(strategy.objective(learner, batch, learner(batch)).sum.detach()) == pytest.approx(
        -min(float(own.sum.detach()), 2.0 * 50)
    )


def test_who_does_not_forget_is_refused(digits):
    with pytest.raises(UsageError, match="asks to forget"):
        check_pair("finetune", Finetune(), digits)
    check_pair("relabel", Relabel(), digits)
    with pytest.raises(UsageError, match="come after all tasks"):
        UnlearnDigits.__base__("toy", [digits[1], digits[0]], "domain", digits.input_shape, "toy")


def test_relabelled_classes_are_never_right():
    y = torch.arange(3, 6).repeat(100)
    found = relabelled({"x": y, "y": y}, range(3, 6), torch.Generator().manual_seed(0))["y"]
    assert not bool((found == y).any())
    assert found.unique().tolist() == [3, 4, 5]


@pytest.fixture(scope="module")
def people():
    shared = {k: v for k, v in WORLD.items() if k != "new_people"}
    return UnlearnBiography(
        requests=2, forgotten=4, neighbours=4, forget_epochs=1, epochs=(1, 1),
        task_id_at_test=True, **shared,
    )  # fmt: skip


def test_relabelled_texts_have_another_persons_answer_of_the_same_kind(people):
    data = people[1].train
    batch = data[torch.arange(len(data))]
    found = relabelled(batch, people[1].classes, torch.Generator().manual_seed(0))
    known = batch["labels"] >= 0
    for kind in batch["kind"].unique():
        rows = batch["kind"] == kind

        def answers(b, rows=rows):
            return sorted(tuple(r[r >= 0].tolist()) for r in b["labels"][rows])

        assert answers(found) == answers(batch)
    wrong = found["labels"] >= 0
    assert torch.equal(found["input_ids"][wrong], found["labels"][wrong])
    before_answer = known.int().cumsum(1) == 0
    assert torch.equal(found["input_ids"][before_answer], batch["input_ids"][before_answer])


def test_a_world_knows_who_is_forgotten_and_who_is_not(people):
    read, first, second = people
    assert (first.people, second.people, read.neighbours) == (range(4), range(4, 8), range(8, 12))
    assert set(read.probes) == {"biography", "control", "neighbours"}
    names = {tuple(x.tolist()) for x in first.train.tensors["input_ids"]}
    assert names.isdisjoint(
        tuple(x.tolist()) for x in read.probes["neighbours"].tensors["input_ids"]
    )
    halves = first.recovery
    assert len(halves.train) == len(halves.test) == 4
    assert first.kind == "forget"


def test_behind_a_shut_gate_o3_is_the_base_to_the_bit(people):
    strategy = O3(targets="all", rank=2, dropout=0.0)
    learner = make_causal(stream=people)
    engine = LightningEngine(
        learner, strategy, trainer, LoopSettings(0, 8), None, Silent(), Silent()
    )
    engine.learn(people[0], strategy.plan(people, 0))
    base = {k: v.clone() for k, v in learner.weights().items()}
    batch = people[1].train[torch.arange(4)]

    def answers(task):
        with torch.no_grad(), learner.evaluating(), strategy.inference(learner, task):
            return learner(batch).clone()

    plain = answers(None)
    overlaps = []
    for t in (1, 2):
        engine.learn(people[t], strategy.plan(people, t))
        now = learner.weights()
        assert all(torch.equal(now[name], kept) for name, kept in base.items())
        assert torch.equal(answers(None), plain)
        assert torch.equal(answers(people[0]), plain)
        assert not torch.equal(answers(people[t]), plain)
        overlaps.append({name: A.clone() for name, (A, _) in strategy.pairs.items()})
    name = next(iter(overlaps[0]))
    assert torch.equal(strategy.past[name], torch.cat([o[name] for o in overlaps]))
    again = O3(targets="all", rank=2)
    again.load_state_dict(strategy.state_dict())
    wanted = answers(people[2])
    with torch.no_grad(), learner.evaluating(), again.inference(learner, people[2]):
        assert torch.equal(learner(batch), wanted)


def test_the_last_weights_are_those_after_the_requests(digits, tmp_path):
    """What is exported by default has met them, and its card says so."""
    from cl_bench.report.card import model_card

    conduct(
        digits,
        Relabel(),
        mlp(digits),
        trainer,
        Identity("toy", "relabel", "seed: 0\n", "python -m cl_bench"),
        loop=LoopSettings(0, 100),
        evaluation=EvalSettings(),
        alignment=AlignmentSettings(enabled=False),
        run_dir=tmp_path / "run",
    )
    assert sorted(p.name for p in (tmp_path / "run/weights").iterdir()) == [
        f"task000{n}.safetensors" for n in range(4)
    ]
    card = model_card(tmp_path / "run", 3, "")
    assert "after 1 of 1 tasks and 2 requests to forget" in card
    assert "forget_0" not in card
