"""O-LoRA and its degenerate cases: penalties, pairs, what is left at the end of a task."""

import copy
import functools
from pathlib import Path

import hydra
import pytest
import torch
from biographies import batch_of, make_causal, world
from hypothesis import given
from hypothesis import strategies as st
from pairs import o_lora, seq_lora, steps
from torch.optim import SGD, AdamW

from cl_bench.cli.build import build
from cl_bench.contracts import Protect
from cl_bench.experiment import seed_training
from cl_bench.metrics import share_inside
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.lowrank.inc_lora import IncLoRA
from cl_bench.strategies.lowrank.o_lora import OLoRA
from cl_bench.subspace import merged_parameters

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[3]
ARCHITECTURES = {"gpt_neox": "attention.query_key_value", "gpt2": "attn.c_attn"}
inc_lora = functools.partial(IncLoRA, rank=2)


def logits(learner):
    learner.eval()
    with torch.no_grad():
        return learner(world()[0].sample(6, 0))


def targets(learner, architecture):
    return {
        m.name: m.merged().clone()
        for m in learner.layers(Protect(bias="free"))
        if m.name.endswith(ARCHITECTURES[architecture])
    }


# -- the penalties ------------------------------------------------------------------------------


def penalty_of(strategy, pasts, pairs):
    """Of layers with these old and these new matrices, without a network around them."""

    class Layer:
        def __init__(self, A, B):
            self.lora_A = {"task1": torch.nn.Linear(1, 1)}
            self.lora_B = {"task1": torch.nn.Linear(1, 1)}
            self.lora_A["task1"].weight = torch.nn.Parameter(A)
            self.lora_B["task1"].weight = torch.nn.Parameter(B)

    strategy.past = {str(i): A for i, A in enumerate(pasts)}
    strategy.layers = {str(i): Layer(A, B) for i, (A, B) in enumerate(pairs)}
    strategy._pair = "task1"
    strategy._strengths = (strategy.lambda1, strategy.lambda2)
    trained = [w for name in strategy.layers for w in strategy._weights(name)]
    return strategy.penalty(None, {}, None), trained


@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_the_penalty_is_the_sum_over_pairs_layers_and_entries(seed, layers, tasks, rank):
    rng = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=rng, dtype=torch.float64)
    old = [[draw(rank, 7) for _ in range(tasks)] for _ in range(layers)]
    new = [(draw(rank, 7), draw(5, rank)) for _ in range(layers)]
    strategy = OLoRA(rank=rank, lambda1=0.5, lambda2=0.3)
    value, trained = penalty_of(strategy, [torch.cat(As) for As in old], new)
    overlaps = sum(
        float((A_i @ A.t()).abs().sum()) for As, (A, _) in zip(old, new, strict=True) for A_i in As
    )
    norms = sum(float(w.norm()) for pair in new for w in pair)
    assert float(value.detach()) == pytest.approx(0.5 * overlaps + 0.3 * norms)
    value.backward()
    for As, (A, B), gA, gB in zip(old, new, trained[::2], trained[1::2], strict=True):
        expected = 0.5 * sum((A_i @ A.t()).sign().t() @ A_i for A_i in As) + 0.3 * A / A.norm()
        torch.testing.assert_close(gA.grad, expected)
        torch.testing.assert_close(gB.grad, 0.3 * B / B.norm())
        assert not any(A_i.requires_grad for A_i in As)


def test_pairs_that_read_different_inputs_cost_nothing_and_equal_ones_do():
    old, new = torch.zeros(2, 6), torch.zeros(2, 6)
    old[:, :3], new[:, 3:] = 1.0, 1.0
    B = torch.zeros(4, 2)
    apart, (A, _) = penalty_of(OLoRA(rank=2), [old], [(new, B)])
    assert apart.item() == 0.0
    apart.backward()
    assert float(A.grad.abs().sum()) == 0.0
    equal, _ = penalty_of(OLoRA(rank=2), [old], [(old.clone(), B)])
    assert equal.item() == pytest.approx(0.5 * float((old @ old.t()).abs().sum()))


def test_norms_have_a_gradient_where_b_is_zero():
    value, (A, B) = penalty_of(
        OLoRA(rank=2, lambda1=0.0, lambda2=0.1), [], [(torch.ones(2, 6), torch.zeros(4, 2))]
    )
    value.backward()
    assert A.grad.isfinite().all()
    assert B.grad.eq(0).all()


def test_strengths_go_by_task_name():
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        patterns = (
            "strategy.lambda1={read_*: 0, *: 5}",
            "strategy.lambda2={read_about: 0.2, *: 0}",
        )
        strategy = build(hydra.compose("config", ["+strategy=o_lora", *patterns]).strategy)
    learner = make_causal()
    learner.begin(world()[0], strategy)
    assert strategy._strengths == (0.0, 0.2)
    strategy.release(learner)
    learner.begin(world()[1], strategy)
    assert strategy._strengths == (5.0, 0.0)


# -- what is trained ----------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("make", [o_lora, seq_lora])
def test_the_pair_alone_is_trained_and_every_target_learns(architecture, make):
    learner, strategy = make_causal(architecture, dropout=0.1), make()
    for task in world():
        before = {n: p.detach().clone() for n, p in learner.named_parameters()}
        optimizer = steps(learner, strategy, task, boundary=False)
        trained = {p for group in optimizer.param_groups for p in group["params"]}
        named = learner.named_trainable()
        assert set(named.values()) == trained
        assert {n.rpartition(".lora_")[0] for n in named} == set(strategy.layers)
        assert {
            n.rpartition(".weight")[0]
            for n in before
            if ARCHITECTURES[architecture] in n and "weight" in n
        } == set(strategy.layers)
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
        frozen = {n: p for n, p in learner.named_parameters() if p not in trained}
        assert all(p.grad is None for p in frozen.values())
        if task.index == 0:
            for name, p in frozen.items():
                assert torch.equal(p, before[name.replace(".base_layer", "")])
        strategy.consolidate(learner, task, strategy.collect(learner, task))
        strategy.release(learner)


def test_earlier_pairs_stay_and_rank_grows_with_tasks():
    learner, strategy = make_causal(), o_lora()
    first = targets(learner, "gpt_neox")
    for t, task in enumerate(world()):
        steps(learner, strategy, task)
        changes = {n: w - first[n] for n, w in targets(learner, "gpt_neox").items()}
        assert {int(torch.linalg.matrix_rank(c, atol=1e-6)) for c in changes.values()} == {
            2 * (t + 1)
        }
        for name, values in strategy.metrics().items():
            assert values["lora_rank"] == 2 * (t + 1) == len(strategy.past[name])
            assert ("lora_overlap" in values) == (t > 0)
            assert 0 < values.get("lora_overlap", 0.5) < 1


def test_the_penalty_keeps_pairs_apart():
    overlaps = []
    for strength in (0.0, 5.0):
        learner, strategy = make_causal(), OLoRA(rank=2, lambda1=strength)
        for task in world():
            steps(learner, strategy, task, count=20)
        overlaps.append([v["lora_overlap"] for v in strategy.metrics().values()])
    free, apart = overlaps
    assert all(a < 0.7 * f for f, a in zip(free, apart, strict=True))


def test_a_pair_moves_only_what_its_rows_read():
    learner, strategy = make_causal(), inc_lora()
    for t, task in enumerate(world()):
        before = targets(learner, "gpt_neox")
        steps(learner, strategy, task)
        for name, after in targets(learner, "gpt_neox").items():
            rows = strategy.past[name][2 * t : 2 * t + 2]
            basis = torch.linalg.qr(rows.t())[0]
            assert share_inside(after - before[name], basis) == pytest.approx(1, abs=1e-5)


def plain_peft(optimizer, shared):
    """The same by PEFT's own adapters, all of them kept apart and active."""
    learner = make_causal(optimizer=optimizer)
    seed_training(0)
    config = peft.LoraConfig(
        r=2, lora_alpha=32, lora_dropout=0.0, target_modules=["query_key_value"]
    )
    tuner = peft.LoraModel(learner, config, "task0")
    for t, task in enumerate(world()):
        if t and not shared:
            seed_training(t)
            tuner.peft_config["task1"] = copy.copy(config)
            tuner.inject_adapter(learner, "task1")
            for module in learner.modules():
                if isinstance(module, peft.tuners.lora.LoraLayer):
                    module.set_adapter(["task0", "task1"])
        latest = f"task{0 if shared else t}"
        trained = [p for n, p in learner.named_parameters() if latest in n]
        for p in learner.parameters():
            p.requires_grad_(False)
        for p in trained:
            p.requires_grad_(True)
        steps = optimizer(trained)
        learner.train()
        for i in range(3):
            batch = batch_of(task.train, *range(8 * i, 8 * i + 8))
            steps.zero_grad()
            learner.loss(learner(batch), batch).backward()
            steps.step()
    return merged_parameters(learner) if shared else _all_merged(learner, tuner)


def _all_merged(learner, tuner):
    tuner.merge_and_unload(adapter_names=["task0", "task1"])
    return {n: p.detach() for n, p in learner.named_parameters()}


@pytest.mark.parametrize("make", [inc_lora, seq_lora])
def test_it_learns_what_adapters_of_peft_that_are_kept_apart_learn(make):
    optimizer = functools.partial(SGD, lr=0.1)
    learner, strategy = make_causal(optimizer=optimizer), make(dropout=0.0)
    for task in world():
        steps(learner, strategy, task)
    expected = plain_peft(optimizer, shared=make is seq_lora)
    start = make_causal().state_dict()
    moved = [float((w.detach() - start[n]).norm()) for n, w in learner.named_parameters()]
    assert sum(moved) > 0.01
    for name, weight in learner.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", [o_lora, seq_lora])
def test_a_network_without_pretraining_may_learn_its_first_task_whole(make):
    plain, learner = make_causal(), make_causal()
    steps(plain, Finetune(), world()[0])
    strategy = make(full_first=True)
    steps(learner, strategy, world()[0])
    start = {n: p.detach().clone() for n, p in learner.named_parameters()}
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, start[name])
    steps(learner, strategy, world()[1])
    moved = {n for n, p in learner.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {n for n in start if n.endswith("query_key_value.weight")}
    assert {v["lora_rank"] for v in strategy.metrics().values()} == {2}


# -- the end of a task --------------------------------------------------------------------------


def boundary_gap(strategy, architecture="gpt_neox"):
    """How far logits move where a task ends, and where the next begins, against how far it came."""
    learner = make_causal(architecture)
    names, start = list(learner.state_dict()), logits(learner)
    steps(learner, strategy, world()[0], boundary=False)
    trained = logits(learner)
    assert "lora_A" in "".join(learner.state_dict())
    strategy.consolidate(learner, world()[0], {})
    strategy.release(learner)
    assert list(learner.state_dict()) == names
    merged = logits(learner)
    optimizer = steps(learner, strategy, world()[1], count=0, boundary=False)
    assert not optimizer.state
    again = logits(learner)
    scale = float((trained - start).abs().max())
    assert scale > 1e-3
    return max(float((x - trained).abs().max()) for x in (merged, again)) / scale


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("make", [o_lora, inc_lora, seq_lora])
def test_merged_the_model_is_what_it_was_and_the_next_task_begins_there(make, architecture):
    assert boundary_gap(make(), architecture) < 1e-4


def test_training_thrown_away_at_the_boundary_would_be_noticed(monkeypatch):
    """Negative control: PEFT's ``unload`` puts back what was there before the adapters."""
    monkeypatch.setattr("cl_bench.adapters.attached.merge_adapted", lambda layer: None)
    assert boundary_gap(inc_lora()) > 0.5


@pytest.mark.skipif(not hasattr(peft, "OSFConfig"), reason="this PEFT has no OSF")
@pytest.mark.parametrize(("end", "kept"), [("unload", False), ("merge_and_unload", True)])
def test_the_task_switch_that_peft_shows_for_osf_discards_the_training(end, kept):
    """Its documented loop (train, ``unload``, wrap again) begins every task where it all began."""
    learner = make_causal()
    start = logits(learner)
    config = peft.OSFConfig(effective_rank=4, target_modules=["query_key_value"])
    model = peft.get_peft_model(learner.backbone, config)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        batch = world()[0].sample(8, 1)
        optimizer.zero_grad()
        learner.loss(learner(batch), batch).backward()
        optimizer.step()
    trained = logits(learner)
    assert (trained - start).abs().max() > 1e-3
    getattr(model, end)()
    before_next = logits(learner)
    reference = trained if kept else start
    torch.testing.assert_close(before_next, reference, atol=1e-4, rtol=1e-3)


def test_a_shared_pair_goes_on_from_itself_on_the_first_weights():
    learner, strategy = make_causal(), seq_lora()
    first = targets(learner, "gpt_neox")
    steps(learner, strategy, world()[0])
    pair = {n: {k: v.clone() for k, v in p.items()} for n, p in strategy.kept["shared"].items()}
    steps(learner, strategy, world()[1], count=0, boundary=False)
    for name, layer in strategy.layers.items():
        assert torch.equal(layer.base_layer.weight, first[name])
        assert torch.equal(layer.lora_A["shared"].weight, pair[name]["lora_A.shared.weight"])
        assert torch.equal(layer.lora_B["shared"].weight, pair[name]["lora_B.shared.weight"])
        assert pair[name]["lora_B.shared.weight"].abs().max() > 0
