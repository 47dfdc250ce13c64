"""EASE: class means in the features of every task's adapters, some of them made up."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from toys import make_learner as make_plain
from toys import make_stream, mlp
from transformers_small import MADE, double, learned, make_learner, union

from cl_bench.contracts import UsageError
from cl_bench.strategies.analytic.ncm import NCM
from cl_bench.strategies.blocks.ease import EASE


def test_fresh_adapters_and_no_weight_of_others_are_the_nearest_class_mean_to_the_last_bit():
    strategy = EASE(r=2, alpha=0.0)
    learner, stream = learned(strategy, rate=0.0)
    ncm = NCM()
    plain, _ = learned(ncm, rate=0.0, epochs=0, stream=double())
    batch = union(stream)
    with torch.no_grad():
        wanted = ncm.predict(plain, batch, None)
        assert torch.equal(strategy.predict(learner, batch, None), wanted)
        strategy.alpha = 0.1
        assert not torch.equal(strategy.predict(learner, batch, None), wanted)


def test_true_prototypes_never_change_and_are_class_means():
    strategy, known, kept = EASE(r=2), {}, {}

    def after(learner, stream, t):
        for j in range(t + 1):
            for c in stream[t].classes:
                own = {
                    k: v[stream[t].everything["y"] == c] for k, v in stream[t].everything.items()
                }
                features = strategy.read(learner, own).view(len(own["y"]), t + 1, -1)[:, j]
                torch.testing.assert_close(strategy.prototypes[j, c], features.mean(0))
                known[j, c] = strategy.prototypes[j, c].clone()
        kept.update({k: v.clone() for k, v in learner.weights().items() if f"task{t}" in k})
        kept.setdefault("frozen", {k: v.clone() for k, v in learner.weights().items()})

    learner, _ = learned(strategy, after=after)
    for (j, c), value in known.items():
        assert torch.equal(strategy.prototypes[j, c], value)
    weights, frozen = learner.weights(), kept.pop("frozen")
    assert all(torch.equal(weights[k], v) for k, v in kept.items()), "old adapters stay"
    body = {k for k in weights if k.startswith("backbone")}
    assert all(torch.equal(weights[k], frozen[k]) for k in body)
    assert len({float(v[0]) for v in known.values()}) == len(known), "adapters differ"


def test_old_classes_are_made_up_of_newer_ones_as_alike_as_they_are():
    strategy = EASE(r=2, temperature=0.5)
    learned(strategy)
    P = strategy.prototypes
    for i, j in ((0, 1), (0, 2), (1, 2)):
        newer = range(3 * j, 9)
        for old in range(3 * i, 3 * i + 3):
            alike = torch.stack([F.cosine_similarity(P[i, old], P[i, n], dim=0) for n in newer])
            weights = (alike / 0.5).exp() / (alike / 0.5).exp().sum()
            wanted = sum(w * P[j, n] for w, n in zip(weights, newer, strict=True))
            torch.testing.assert_close(P[j, old], wanted)


def test_logits_of_old_classes_do_not_move_without_the_weight_of_others():
    strategy, batch, seen = EASE(r=2, alpha=0.0), union(double()), []
    learned(
        strategy,
        after=lambda learner, stream, t: seen.append(strategy.predict(learner, batch, None)),
    )
    for t in (1, 2):
        torch.testing.assert_close(seen[t][:, : 3 * t], seen[t - 1], rtol=0, atol=1e-12)


def test_other_adapters_add_the_mean_of_what_they_say():
    strategy = EASE(r=2, alpha=0.3)
    learner, stream = learned(strategy)
    batch = {k: v[:5] for k, v in stream[1].everything.items()}
    with torch.no_grad():
        phi = strategy.read(learner, batch).view(5, 3, -1)
        found = strategy.predict(learner, batch, None)
    said = torch.stack(
        [F.cosine_similarity(phi[:, j, None], strategy.prototypes[j], dim=2) for j in range(3)]
    )
    for c in range(9):
        others = [said[j, :, c] for j in range(3) if j != c // 3]
        torch.testing.assert_close(
            found[:, c], said[c // 3, :, c] + 0.3 * (others[0] + others[1]) / 2
        )
    alone = strategy.predict(learner, {k: v[2:3] for k, v in batch.items()}, None)
    torch.testing.assert_close(alone, found[2:3], rtol=0, atol=1e-12)
    told = strategy.predict(learner, batch, stream[1])
    assert told.isfinite().sum(0).nonzero().flatten().tolist() == [3, 4, 5]


def test_a_task_is_learned_by_scaled_cosines_over_its_own_classes():
    strategy, stream = EASE(r=2), double()
    learner = make_learner(stream)
    strategy.tasks, strategy.begun = [(0, 3)], 1
    learner.begin(stream[1], strategy)
    scale = learner.extras(strategy)["scale"].factor
    batch = stream[1].everything
    f, w = learner.features(batch), learner.heads[1].weight
    cosines = F.cosine_similarity(f[:, None], w[None], dim=2)
    loss = strategy.objective(learner, batch, learner(batch))
    torch.testing.assert_close(loss.mean, F.cross_entropy(cosines, batch["y"] - 3))
    loss.mean.backward()
    assert scale.grad.abs() > 0
    moved = {
        n for n, p in learner.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert all("task1" in n or n in ("heads.1.weight", "extra.EASE.scale.factor") for n in moved)
    assert any("task1" in n for n in moved)
    assert not any(p.requires_grad for n, p in learner.named_parameters() if "task0" in n)


def test_what_it_cannot_learn_is_refused_by_name():
    with pytest.raises(UsageError, match=r"EASE works inside .* made of Linear"):
        MADE["ease"]().check(make_plain(make_stream("class"), mlp()))
