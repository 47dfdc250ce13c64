"""Somebody's model and optimizer are left as they were; what a guard remembers travels."""

import copy
import io

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from loops import (
    OPTIMIZERS,
    Module,
    condition,
    data,
    guard_of,
    hooks,
    leaks,
    loader,
    loop,
    matrices,
    network,
    normalised,
    own_cache,  # noqa: F401
    trainer,
)
from torch.optim import SGD, Adam, AdamW

from cl_bench.contracts import Strategy, UsageError
from cl_bench.integrations import ContinualCallback, Guarded
from cl_bench.strategies.isolation.freeze import Freeze
from cl_bench.strategies.projection.gpm import GPM

# -- the model is left as it was found ------------------------------------------------------------


def test_model_and_optimizer_are_untouched():
    model = normalised().train()
    model[4].bias.requires_grad_(False)
    optimizer = Adam(model.parameters())
    found = condition(model)
    guard = Guarded(model, GPM(threshold=0.97))
    for t in range(2):
        with guard.task(optimizer, sample=data(t)):
            loop(model, optimizer, t, epochs=1)
        assert condition(model) == found
        assert hooks(optimizer) == 0


def test_norms_stay_as_they_are_after_the_first_task_even_if_the_loop_calls_train():
    model = normalised()
    optimizer = AdamW(model.parameters(), weight_decay=0.1)
    guard = Guarded(model, GPM(threshold=0.97))
    with guard.task(optimizer, sample=data(0)):
        loop(model, optimizer, 0, epochs=1)
    before = {name: v.clone() for name, v in model[1].state_dict().items()}
    assert before["num_batches_tracked"] > 0
    with guard.task(optimizer, sample=data(1)):
        loop(model, optimizer, 1, epochs=1)
        twin = copy.deepcopy(model)
        twin.train()
        assert not twin[1].training
        torch.save(model, io.BytesIO())
    assert all(torch.equal(before[name], v) for name, v in model[1].state_dict().items())
    assert model[1].training


def test_frozen_weights_keep_still_though_the_optimizer_holds_them():
    model = network()
    optimizer = AdamW(model.parameters(), weight_decay=0.1)
    guard = Guarded(model, Freeze(n_blocks=1))
    with guard.task(optimizer, sample=data(0)):
        loop(model, optimizer, 0, epochs=1)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    before = matrices(model)
    with guard.task(optimizer, sample=data(1)):
        optimizer.step()
        loop(model, optimizer, 1, epochs=1)
    after = matrices(model)
    assert torch.equal(before["1"], after["1"])
    assert not torch.equal(before["3"], after["3"])
    assert all(p.requires_grad for p in model.parameters())


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
def test_an_exception_releases_and_is_not_remembered(error):
    model = normalised()
    optimizer = SGD(model.parameters(), lr=0.1)
    strategy = GPM(threshold=0.97)
    guard = Guarded(model, strategy)
    with guard.task(optimizer, sample=data(0)):
        loop(model, optimizer, 0, epochs=1)
    memory, found = dict(strategy.memory), condition(model)

    def break_off():
        loop(model, optimizer, 1, epochs=1)
        raise error

    with pytest.raises(error), guard.task(optimizer, sample=data(1)):
        break_off()
    assert condition(model) == found
    assert hooks(optimizer) == 0
    assert strategy.confinement is None
    assert strategy.memory == memory
    assert guard.tasks == 1
    with guard.task(optimizer, sample=data(1)):
        loop(model, optimizer, 1, epochs=1)
    assert guard.tasks == 2


class Fails(Strategy):
    def setup(self, learner, task):
        learner.hold(learner.blocks())
        raise RuntimeError("no")


def test_a_setup_that_fails_leaves_nothing_behind():
    model = normalised()
    found, optimizer = condition(model), SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(RuntimeError, match="no"),
        Guarded(model, Fails()).task(optimizer, sample=data(0)),
    ):
        pytest.fail("entered")
    assert condition(model) == found
    assert hooks(optimizer) == 0


class Breaks(lightning.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        raise RuntimeError("broken")


def test_callback_leaves_the_module_as_it_was():
    module = Module(normalised(), OPTIMIZERS["AdamW"])
    strategy = GPM(threshold=0.97)
    found = condition(module.network)
    trainer(guard_of(strategy, 0), epochs=1).fit(module, loader(0))
    assert condition(module.network) == found
    memory = dict(strategy.memory)
    before = {name: v.clone() for name, v in module.network[1].state_dict().items()}
    with pytest.raises(RuntimeError, match="broken"):
        trainer(guard_of(strategy, 1), Breaks()).fit(module, loader(1))
    assert condition(module.network) == found
    assert strategy.memory == memory
    assert strategy.confinement is None
    trainer(guard_of(strategy, 1), epochs=1).fit(module, loader(1))
    assert condition(module.network) == found
    assert all(torch.equal(before[k], v) for k, v in module.network[1].state_dict().items())


# -- saving and resuming --------------------------------------------------------------------------


def test_the_state_of_a_plain_guard_travels():
    strategy, model = GPM(threshold=0.97), network()
    optimizer = SGD(model.parameters(), lr=0.1)
    guard = Guarded(model, strategy)
    with guard.task(optimizer, sample=data(0)):
        loop(model, optimizer, 0)
    saved = io.BytesIO()
    torch.save(guard.state_dict(), saved)
    saved.seek(0)
    twin = copy.deepcopy(model)
    other = Guarded(twin, GPM(threshold=0.97))
    other.load_state_dict(torch.load(saved, weights_only=True))
    assert other.tasks == 1
    for m, g in ((model, guard), (twin, other)):
        optimizer = SGD(m.parameters(), lr=0.1)
        with g.task(optimizer, sample=data(1)):
            loop(m, optimizer, 1)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_checkpoints_carry_the_memory(tmp_path):
    module, strategy = Module(network(), OPTIMIZERS["Adam"]), GPM(threshold=0.97)
    first = trainer(guard_of(strategy, 0))
    first.fit(module, loader(0))
    first.save_checkpoint(tmp_path / "first.ckpt")
    memory = dict(strategy.memory)
    second = trainer(
        guard_of(strategy, 1),
        ModelCheckpoint(tmp_path, filename="half", every_n_epochs=1, save_top_k=-1),
        epochs=1,
        enable_checkpointing=True,
    )
    second.fit(module, loader(1))
    half = tmp_path / "half.ckpt"

    # Another process: a new module, a strategy without memory.
    other, resumed = Module(network(), OPTIMIZERS["Adam"]), GPM(threshold=0.97)
    again = trainer(guard_of(resumed, 1), epochs=3)
    again.fit(other, loader(1), ckpt_path=half)
    assert again.global_step == 3 * len(loader(1))
    start = Module(network(), OPTIMIZERS["Adam"])
    start.load_state_dict(torch.load(tmp_path / "first.ckpt", weights_only=True)["state_dict"])
    assert max(leaks(memory, matrices(start), matrices(other)).values()) <= 1e-4
    assert all(resumed.memory[n].shape[1] >= M.shape[1] for n, M in memory.items())

    third = ContinualCallback(GPM(), sample=data(1), task=2)
    with pytest.raises(UsageError, match="wrote after the task before"):
        trainer(third).fit(other, loader(1), ckpt_path=half)
    with pytest.raises(UsageError, match="task=1"):
        trainer(guard_of(GPM(), 0), epochs=9).fit(
            other, loader(0), ckpt_path=tmp_path / "first.ckpt"
        )
