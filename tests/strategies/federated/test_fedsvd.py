"""Federated low-rank pairs: what the server may turn, and what privacy costs."""

import pytest
import torch
from federations import engine_of
from toys import make_learner, make_stream, mlp

from cl_bench.contracts import UsageError
from cl_bench.federation import Federation
from cl_bench.strategies.federated.fed_lora import FedLoRA
from cl_bench.strategies.federated.fedsvd import FedSVD, turn
from cl_bench.strategies.federated.ffa_lora import FFALoRA

FEDERATION = Federation(clients=3, per_round=3, rounds=3)


def run(strategy, federation=FEDERATION, tasks=2):
    stream = make_stream(tasks=tasks, n=45)
    torch.manual_seed(3)
    learner = make_learner(stream, mlp())
    engine = engine_of(learner, strategy, federation)
    before = {k: v.clone() for k, v in learner.weights().items()}
    for t, task in enumerate(stream):
        engine.learn(task, strategy.plan(stream, t))
    return stream, learner, before, engine


def pairs(strategy, learner):
    return {
        name: [part.weight.detach() for part in strategy.pair(learner, name)]
        for name in strategy.shapes
    }


def test_a_turn_keeps_the_product_and_makes_a_orthonormal():
    rng = torch.Generator().manual_seed(0)
    A = torch.randn(4, 30, generator=rng).double()
    B = torch.randn(20, 4, generator=rng).double()
    turned_A, turned_B = turn(A, B)
    torch.testing.assert_close(turned_B @ turned_A, B @ A, rtol=0, atol=1e-12)
    torch.testing.assert_close(turned_A @ turned_A.t(), torch.eye(4).double())
    values = torch.linalg.svdvals(B @ A)[:4]
    torch.testing.assert_close(turned_B.norm(dim=0), values)


def test_the_server_turns_a_that_clients_leave_alone_and_keeps_the_product():
    strategy = FedSVD(rank=2)
    _, learner, before, _ = run(strategy)
    for name, (A, B) in pairs(strategy, learner).items():
        torch.testing.assert_close(A @ A.t(), torch.eye(2), atol=1e-5, rtol=0)
        moved = {k: v for k, v in before.items() if k.startswith(name)}
        assert all(torch.equal(learner.weights()[k], v) for k, v in moved.items())
        assert bool(B.any())
    now = {k: v.clone() for k, v in learner.weights().items()}
    update = strategy.server_update(learner, {})
    learner.load_weights({k: v + update.get(k, torch.zeros(())) for k, v in now.items()})
    for name, (A, B) in pairs(strategy, learner).items():
        key = name.replace(".", "-")
        old = [now[k] for k in now if f".{key}." in k]
        product = max(old, key=lambda w: w.shape[0]) @ min(old, key=lambda w: w.shape[0])
        assert float((B @ A - product).abs().max()) < 1e-6


def test_without_turns_it_is_ffa_lora_to_the_bit():
    one, other = run(FedSVD(rank=2, every=None)), run(FFALoRA(rank=2))
    left = {k.replace("FedSVD", "it"): v for k, v in one[1].weights().items()}
    right = {k.replace("FFALoRA", "it"): v for k, v in other[1].weights().items()}
    assert left.keys() == right.keys()
    assert all(torch.equal(left[k], right[k]) for k in left)


def test_frozen_a_stays_and_averaged_a_moves():
    for strategy, stays in ((FFALoRA(rank=2), True), (FedLoRA(rank=2), False)):
        _, learner, before, _ = run(strategy)
        for name in strategy.shapes:
            key = name.replace(".", "-")
            names = [k for k in before if f".{key}.A." in k]
            assert names
            assert all(torch.equal(before[k], learner.weights()[k]) for k in names) == stays


def test_the_pairs_are_part_of_what_is_scored():
    strategy = FedSVD(rank=4)
    stream, learner, _, engine = run(
        strategy, Federation(clients=3, per_round=3, rounds=12), tasks=1
    )
    scores = engine.evaluate(list(stream), 50, None)
    for name in strategy.shapes:
        strategy.pair(learner, name)[1].weight.data.zero_()
    assert scores["t0"] > engine.evaluate(list(stream), 50, None)["t0"]


def test_targets_that_are_no_layers_are_refused():
    with pytest.raises(UsageError, match=r"strategy\.targets"):
        FedLoRA(targets=["nowhere"]).check(make_learner(make_stream()))


def test_private_steps_are_clipped_noisy_and_counted():
    pytest.importorskip("opacus")
    from opacus.accountants import RDPAccountant

    strategy = FFALoRA(rank=2, noise=1.5, clip=0.1)
    run(strategy, tasks=1)
    (told,) = strategy.metrics().values()
    accountant = RDPAccountant()
    for _ in range(6):  # 3 rounds of 15 samples in batches of 10
        accountant.step(noise_multiplier=1.5, sample_rate=10 / 15)
    assert told["steps"] == 6
    assert told["epsilon"] == pytest.approx(accountant.get_epsilon(1e-5))
    quiet = FFALoRA(rank=2, noise=1e-9, clip=0.1)
    stream = make_stream(tasks=1)
    learner = make_learner(stream, mlp())
    learner.equip(quiet)
    learner.begin(stream[0], quiet)
    learner.stand(None, 0, 1, 1)
    batch = stream[0].train[torch.arange(10)]
    loss, _ = learner.step_loss(batch)
    loss.backward()
    single = learner.gradients(batch, per_sample=True)
    norm = torch.stack([g.flatten(1).square().sum(1) for g in single.values()]).sum(0).sqrt()
    quiet.constrain(learner)
    for name, p in learner.network.named_parameters():
        if p.grad is not None:
            factor = (0.1 / norm).clamp(max=1)
            wanted = torch.einsum("n,n...->...", factor, single[name]) / 10
            torch.testing.assert_close(p.grad, wanted, atol=1e-7, rtol=1e-4)
