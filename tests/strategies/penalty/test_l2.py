"""L2: EWC whose Fisher information is 1 everywhere."""

import torch
from toys import learn, learn_stream, make_learner, make_stream, weights

from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.penalty.l2 import L2


class UnitFisher(EWC):
    """Sees every weight as certain as any other."""

    def collect(self, learner, task):
        ones = {n: torch.ones_like(p) for n, p in learner.named_trainable().items()}
        return {"samples": torch.tensor(1.0), **ones}


def learned(strategy, scenario="domain"):
    stream = make_stream(scenario, tasks=3)
    learner = make_learner(stream).double()
    for task in stream:
        task.data.tensors["x"] = task.data.tensors["x"].double()
    learn_stream(learner, strategy, stream, epochs=1)
    return weights(learner)


def test_it_is_ewc_with_unit_fisher_around_the_latest_weights():
    ours = learned(L2(strength=0.7))
    ewc = learned(UnitFisher(strength=0.7, anchor="latest", information="mean"))
    other = learned(L2(strength=1.4))  # the control
    for name, w in ours.items():
        torch.testing.assert_close(w, ewc[name], atol=1e-12, rtol=1e-12)
        assert (w - other[name]).norm() > 1e-4


def test_without_strength_it_is_finetune():
    ours, free = learned(L2(strength=0.0)), learned(Finetune())
    assert all(torch.equal(w, free[name]) for name, w in ours.items())


def test_a_task_is_pulled_to_the_weights_of_the_last_one_and_its_own_head_is_free():
    stream = make_stream("task", tasks=2)
    strategy, learner = L2(strength=0.6), make_learner(stream)
    learn(learner, strategy, stream[0], epochs=1)
    anchor = weights(learner)
    learner.begin(stream[1], strategy)
    with torch.no_grad():
        for p in learner.parameters():
            p += 0.5
    value = strategy.penalty(learner, {}, torch.empty(0))
    shared = sum(p.numel() for n, p in anchor.items() if not n.startswith("heads."))
    torch.testing.assert_close(value, torch.tensor(0.3 * 0.25 * shared))
    heads = list(learner.heads.parameters())
    for head in heads:
        head.requires_grad_(True)
    found = torch.autograd.grad(value, heads, allow_unused=True)
    assert found == (None, None)
