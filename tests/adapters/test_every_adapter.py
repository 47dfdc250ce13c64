"""Every yaml of ``conf/adapter`` keeps the laws of adapters, on transformers of four kinds."""

import io

import pytest
import torch
from nets import NAMES, setting

from runs import flat

pytest.importorskip("peft")
pytest.importorskip("transformers")

every = pytest.mark.parametrize("name", NAMES)
KINDS = ("vit", "bert", "llama", "t5")
LASTING = (("per_task", "merge"), ("per_task", "keep"), ("shared", "keep"), ("per_task", "reset"))
REWRITING = ("pissa", "olora", "corda")
"""They cut themselves out of the weight, so none can stand beside another on the first weights."""


def leaves(state):
    return dict(flat("", state))


def lasting(name):
    return [pair for pair in LASTING if name not in REWRITING or pair != ("per_task", "keep")]


def close(one, other, bound):
    """Up to a share of the largest output."""
    assert other.isfinite().all()
    gap = float((one - other).abs().max() / other.abs().max())
    assert gap <= bound, gap


def keeps_the_laws(name, kind, lifetime, end):
    """Two tasks: zero at attach, merged as unmerged, counted right, nothing left behind."""
    s = setting(name, kind, lifetime=lifetime, end=end)
    names, own = list(s.learner.state_dict()), lifetime == "per_task" and end == "keep"
    after = []
    for t in range(2):
        before = s.outputs(t)
        optimizer = s.begin(t)
        training = {p for group in optimizer.param_groups for p in group["params"]}
        inside = set(s.adapter.attached.parameters())
        heads = {p for n, p in s.learner.named_parameters() if n.startswith("heads")}
        assert inside <= training <= inside | heads
        assert sum(p.numel() for p in inside) == s.adapter.count > 0
        rounding = 5e-6 if name in REWRITING else 1e-6  # a part of the weight, taken out and added
        close(s.outputs(t), s.bare(t) if own and t else before, rounding)
        for i in range(3):
            s.step(t, i, optimizer)
        after.append(s.outputs(t))
        if own and t:
            with s.strategy.inference(s.learner, s.stream[0]):
                close(s.outputs(0), after[0], 1e-5)  # in the middle of a task
            assert torch.equal(s.outputs(t), after[t])
        s.end(t)
        assert list(s.learner.state_dict()) == names
        close(s.outputs(t), before if end == "reset" else after[t], 1e-5)
    assert s.learner.training
    with s.strategy.inference(s.learner, s.stream[0]):
        if own:
            close(s.outputs(0), after[0], 1e-5)
    close(s.outputs(1), before if end == "reset" else after[1], 1e-5)


def survives_a_kill(name, kind, lifetime, end):
    """What is saved when the second task begins, and inside it, is all that the rest needs."""
    whole = setting(name, kind, lifetime=lifetime, end=end)
    whole.learn(0)
    files = {"start": io.BytesIO(), "inside": io.BytesIO()}
    torch.save(whole.saved(), files["start"])
    optimizer = whole.begin(1)
    whole.step(1, 0, optimizer)
    torch.save({**whole.saved(), "optimizer": optimizer.state_dict()}, files["inside"])
    rng = torch.get_rng_state()
    whole.step(1, 1, optimizer)
    whole.end(1)
    for file in files.values():
        file.seek(0)
    start, inside = (torch.load(file, weights_only=True) for file in files.values())
    resumed = setting(name, kind, lifetime=lifetime, end=end)
    resumed.load(start)
    optimizer = resumed.begin(1)
    resumed.load(inside)
    optimizer.load_state_dict(inside["optimizer"])
    torch.set_rng_state(rng)
    resumed.step(1, 1, optimizer)
    resumed.end(1)
    one, other = leaves(resumed.saved()), leaves(whole.saved())
    assert one.keys() == other.keys()
    assert [key for key in one if one[key] != other[key]] == []


@every
def test_it_starts_at_zero_merges_exactly_and_leaves_a_plain_network(name):
    keeps_the_laws(name, "bert", *lasting(name)[NAMES.index(name) % 2])


@every
def test_killed_inside_the_second_task_it_goes_on_bit_for_bit(name):
    shared = name in REWRITING or NAMES.index(name) % 2
    survives_a_kill(name, "bert", *(("shared", "keep") if shared else ("per_task", "merge")))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@every
def test_on_every_kind_of_network_with_every_lifetime(name, kind):
    for lifetime, end in lasting(name):
        keeps_the_laws(name, kind, lifetime, end)
        survives_a_kill(name, kind, lifetime, end)
