"""The laws of the house: what every strategy must keep, each a function of a case's name.

Each raises ``AssertionError`` where a strategy breaks the law, and ``RefusedError`` where the run
is refused before any work.
"""

import copy
import io

import pytest
import torch
from cases import Run, Setting, relative_gap
from dying import Killed

from cl_bench.contracts.strategy import overrides
from cl_bench.strategies.baselines.finetune import Finetune
from runs import differences, final_weights, flat

ROUNDING = 1e-9
"""Of double precision, over a whole run."""

OF_COUNTS = 1e-6
"""Batches of text are weighed by ratios of token counts, which are tensors in single precision."""

TIMES = ("client_seconds", "federation")
"""What a federation measures with a clock."""


def leaves(state):
    return dict(flat("", state))


def whole_run(name, directory):
    """The run that others are compared with, in double precision."""
    return Setting(name).conduct(directory)


def state_round_trip(name):
    """What is saved of a strategy after a task is all that the next one needs."""
    first = Setting(name, calm=False)
    engine = first.silent_engine()
    first.learn(engine, 0)
    file = io.BytesIO()
    learner = first.learner
    torch.save(
        {
            "strategy": first.strategy.state_dict(),
            "weights": learner.weights(),
            "progress": learner.progress_state(),
        },
        file,
    )
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = Setting(name, calm=False)
    second.strategy.load_state_dict(saved["strategy"])
    second.learner.equip(second.strategy)
    second.learner.load_weights(saved["weights"])
    second.learner.load_progress_state(saved["progress"])
    assert leaves(second.strategy.state_dict()) == leaves(first.strategy.state_dict())
    first.learn(engine, 1)
    second.learn(second.silent_engine(), 1)
    assert leaves(second.learner.weights()) == leaves(learner.weights()), "the next task differs"
    assert leaves(second.strategy.state_dict()) == leaves(first.strategy.state_dict())


def kill_and_resume(name, directory):
    """A run that is killed inside a task and resumed leaves what a whole one does.

    The task is the second; the first, where only that trains; and where nothing does, it is killed
    as the second begins.
    """
    whole = Setting(name, calm=False)
    first = []
    count_first_task(whole, first)
    whole.conduct(directory / "whole", every=2)
    dying = Setting(name, calm=False)
    task = int(whole.learner.batches > first[0])
    dying.learner.dies_at = max(first[0] * task + 1, whole.learner.batches - 1)
    dying.learner.dies_in_task = 1 if whole.learner.batches == 0 else None
    with pytest.raises(Killed):
        dying.conduct(directory / "killed", every=2)
    inside = list((directory / "killed" / "checkpoints").glob(f"task000{task}-step*[1-9]*.pt"))
    trained = bool(whole.learner.batches)
    assert inside or not trained, "it died before there was a checkpoint inside the task"
    Setting(name, calm=False).conduct(directory / "killed", every=2, resume=True)
    found = differences(directory / "whole", directory / "killed", TIMES * whole.federated)
    assert found == [], found
    one, other = (final_weights(directory / kind) for kind in ("whole", "killed"))
    for weights in (one, other):
        for key in [k for k in weights if "seconds" in k]:
            del weights[key]
    assert one == other


def count_first_task(setting, found):
    """Append the batches that the run had learned when its second task began."""
    begin = setting.learner.begin

    def counting(task, strategy, start="current"):
        if task.index == 1 and not found:
            found.append(setting.learner.batches)
        return begin(task, strategy, start)

    setting.learner.begin = counting


def two_processes(name, alone, pair):
    """Two processes come to what one does, and to the same."""
    first, second = pair(name)
    assert leaves(first.weights) == leaves(second.weights), "the processes disagree"
    assert leaves(first.state) == leaves(second.state), "the processes remember different things"
    agree(first, alone)


def agree(found, wanted, rounding=ROUNDING):
    """Same weights and scores up to rounding."""
    gap = relative_gap(found.weights, wanted.weights)
    assert gap < rounding, f"weights differ by {gap:.2g}"
    close = {"atol": 1e-9, "rtol": 0, "equal_nan": True}
    torch.testing.assert_close(found.matrix, wanted.matrix, **close)


def accumulation(name, alone, directory):
    """Two half batches a step are one whole batch; where batches are replayed, it runs at least."""
    halves = Setting(name, cut=2, accumulate=2)
    found = halves.conduct(directory)
    require_finite(found)
    if not overrides(halves.strategy, "on_batch"):
        agree(found, alone, OF_COUNTS if halves.stream.modality == "text" else ROUNDING)


def half_precision(name, directory):
    """bf16-mixed: everything ends finite, and weights stay what they were."""
    found = Setting(name, precision="bf16-mixed", dtype=torch.float32).conduct(directory)
    require_finite(found)
    for key, weight in found.weights.items():
        if weight.is_floating_point():
            assert weight.dtype == torch.float32, f"{key} is {weight.dtype}"


def require_finite(run: Run):
    for key, weight in run.weights.items():
        assert weight.isfinite().all(), key
    for key, value in flat_tensors("", run.state):
        assert value.isfinite().all(), key
    assert run.matrix[-1].isfinite().all()


def flat_tensors(where, value):
    if torch.is_tensor(value):
        yield where, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from flat_tensors(f"{where}/{key}", inner)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from flat_tensors(f"{where}/{i}", inner)


def packed(name, alone, directory):
    """Several batches a training step are the same steps."""
    agree(Setting(name, pack=4).conduct(directory), alone)


def no_trace(name):
    """What ``setup`` attaches is gone after ``release``, and copies stand on their own."""
    setting = Setting(name)
    engine = setting.silent_engine()
    before = traces(setting.learner)
    for t in range(2):
        setting.learn(engine, t)
        after = traces(setting.learner)
        assert after.keys() == before.keys()
        for module, kept in before.items():
            assert after[module] == kept, f"after task {t}, {module!r}: {after[module]}"
    learner = setting.learner
    passes_are_told(setting)
    # What is held stays so until the next task begins.
    untouched = Setting(name).learner
    for each in (learner, untouched):
        each.begin(setting.stream[1], Finetune())
        each.train()
    same = switches(learner) == switches(untouched)
    assert same, "in the next task, something else learns or is in training mode"
    copies_stand_alone(learner, untouched, setting.stream[1])


def passes_are_told(setting):
    """An answer takes as many passes as the strategy says, of the network or of copies of it."""
    learner, strategy, task = setting.learner, setting.strategy, setting.stream[1]
    features = type(learner)._features
    calls = []

    def counted(own, batch):
        calls.append(1)
        return features(own, batch)

    known = task if setting.stream.task_id_at_test else None
    seen = learner.register_forward_hook(lambda *_: calls.append(1))
    type(learner)._features = counted
    try:
        with torch.no_grad(), learner.evaluating(), strategy.inference(learner, known):
            strategy.predict(learner, task.train[torch.arange(4)], known)
    finally:
        seen.remove()
        type(learner)._features = features
    assert len(calls) == strategy.passes, f"{len(calls)} passes, and it says {strategy.passes}"


HOOKS = tuple(k for k in vars(torch.nn.Module()) if k.endswith("_hooks") and isinstance(k, str))


def traces(learner):
    """Per module: class, ``forward``, hooks, names of what it holds."""
    found = {}
    for name, module in learner.named_modules():
        if name == "extra" or name.startswith("extra."):
            continue  # these are the strategy's own, and stay
        held = vars(module)
        found[name] = {
            "class": type(module),
            "forward": getattr(module.forward, "__func__", module.forward),
            "hooks": {k: len(held[k]) for k in HOOKS if held[k]},
            "parameters": {
                k: (type(p), len(p._backward_hooks or ()), p.dtype)
                for k, p in module._parameters.items()
                if p is not None
            },
            "buffers": sorted(module._buffers),
            "attributes": set() if module is learner else set(held),
        }
    found["state"] = {"keys": [k for k in learner.state_dict() if not k.startswith("extra.")]}
    return found


def switches(learner):
    """What learns, and which modules are in training mode."""
    return (
        {name: p.requires_grad for name, p in learner.named_parameters()},
        {name: module.training for name, module in learner.named_modules()},
    )


def copies_stand_alone(learner, fresh, task):
    """A deep copy computes with its own weights: with others, what a fresh network does."""
    batch = task.train[torch.arange(4)]
    copied = copy.deepcopy(learner)
    rng = torch.Generator().manual_seed(0)
    moved = {
        k: v + 0.1 * torch.randn(v.shape, generator=rng, dtype=v.dtype)
        if v.is_floating_point()
        else v.clone()
        for k, v in learner.weights().items()
    }
    with torch.no_grad():
        for each in (learner, copied, fresh):
            each.eval()
        before = learner(batch)
        for each in (copied, fresh):
            each.load_weights(moved)
        fresh.load_progress_state(learner.progress_state())
        assert torch.equal(copied(batch), fresh(batch)), "the copy computes with other weights"
        assert not torch.equal(copied(batch), before)
        assert torch.equal(learner(batch), before), "the copy shares its weights"
