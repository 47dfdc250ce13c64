"""Clipping by the norm of all gradients."""

import functools

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from toys import make_engine, make_learner, make_stream, mlp, weights

from cl_bench.parallel.clipping import clip_by_norm
from cl_bench.strategies.baselines.finetune import Finetune


@pytest.mark.parametrize("most", [0.5, 100.0])
def test_alone_it_is_what_torch_does(most):
    mine = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    for one, other in zip(mine, theirs, strict=True):
        one.grad = torch.randn_like(one)
        other.grad = one.grad.clone()
    groups = [{"params": mine[:1]}, {"params": mine[1:], "owned": ["a/0"]}, {"params": []}]
    clip_by_norm(SGD(groups, lr=0.1), most)
    torch.nn.utils.clip_grad_norm_(theirs, most)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    longest = torch.cat([p.grad.flatten() for p in mine]).norm()
    assert float(longest) < most + 1e-5


def test_a_fused_optimizer_is_clipped_in_mixed_precision_too():
    def learned(clip, fused):
        torch.manual_seed(0)
        learner = make_learner(
            make_stream(), mlp(bias=True), functools.partial(AdamW, lr=1e-2, fused=fused)
        )
        strategy = Finetune()
        stream = make_stream()
        engine = make_engine(
            learner, strategy, precision="bf16-mixed", gradient_clip_val=clip, pack=1
        )
        engine.learn(stream[0], strategy.plan(stream, 0))
        return weights(learner)

    clipped, free, plain = learned(1e-3, True), learned(None, True), learned(1e-3, False)
    assert any(not torch.equal(clipped[n], free[n]) for n in clipped)
    for name, weight in plain.items():
        torch.testing.assert_close(clipped[name], weight, atol=1e-5, rtol=1e-3)
