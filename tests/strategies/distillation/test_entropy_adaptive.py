"""Weights by entropy, against the sum over a distribution written out, and what they do."""

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from texts import make_learner, make_stream, whole

from cl_bench.contracts import IGNORE
from cl_bench.strategies.distillation.entropy_adaptive import EntropyAdaptive


def test_a_sure_token_counts_nothing_and_an_unsure_one_in_full():
    even = torch.zeros(1, 50)
    sure = F.one_hot(torch.tensor([7]), 50) * 1e3
    half = torch.tensor([[9.0, 9.0] + [-1e3] * 48])
    weights = EntropyAdaptive().weights(torch.cat([even, sure.float(), half]))
    assert weights.tolist() == pytest.approx([1.0, 0.0, math.log(2) / math.log(20)], abs=1e-6)
    squared = EntropyAdaptive(power=2.0).weights(half)
    assert float(squared) == pytest.approx((math.log(2) / math.log(20)) ** 2)
    assert float(EntropyAdaptive(top=2).weights(half)) == pytest.approx(1.0)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_the_loss_is_each_tokens_times_its_weight_without_gradient_through_it(family):
    stream = make_stream()
    learner = make_learner(family, stream).eval()
    strategy, batch = EntropyAdaptive(top=5), whole(stream[0].test)
    out = learner(batch)
    found = strategy.objective(learner, batch, out)
    logits, labels = learner.targets(out, batch)
    total, count = 0.0, 0
    for row, wanted in zip(logits.flatten(0, 1), labels.flatten(), strict=True):
        if wanted == IGNORE:
            continue
        p = row.detach().double().sort(descending=True).values[:5].softmax(0)
        weight = float(-(p * p.log()).sum()) / math.log(5)
        total = total + weight * F.cross_entropy(row[None], wanted[None]).double()
        count += 1
    assert found.count == count
    assert float(found.sum.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    head = learner.heads[0].weight
    ours, theirs = (torch.autograd.grad(s, head, retain_graph=True)[0] for s in (found.sum, total))
    assert torch.allclose(ours, theirs.to(ours), rtol=1e-4, atol=1e-6)
