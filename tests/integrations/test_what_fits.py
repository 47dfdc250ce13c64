"""Networks, samples, optimizers and trainers that fit a guard, and those that are refused."""

import functools
import types
import warnings

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
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
    second_task,
    trainer,
)
from torch import nn
from torch.optim import LBFGS, SGD, Adam
from transformers import LlamaConfig, LlamaForCausalLM

from cl_bench.contracts import Needs, Protect, Strategy, UsageError
from cl_bench.experiment import Together
from cl_bench.integrations import ContinualCallback, Guarded
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.distillation.lwf import LwF
from cl_bench.strategies.distillation.lwf_mc import LwFMC
from cl_bench.strategies.federated.fedavg import FedAvg
from cl_bench.strategies.isolation.freeze import Freeze
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.projection.sgp import SGP


class Bordering(Strategy):
    needs = Needs(plateau=True)


REFUSED = {
    "runs in a federation": FedAvg(),
    "reached a plateau": Bordering(),
    "name these in the order": LwFMC(),
    "project='input'": GPM(project="input"),
    "federation|plateau": Together({"gpm": GPM(), "bordering": Bordering()}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_strategies_that_need_our_engine_are_refused(reason):
    with pytest.raises(UsageError, match=reason):
        Guarded(network(), REFUSED[reason])
    with pytest.raises(UsageError, match=reason):
        guard_of(REFUSED[reason], 0)


@pytest.mark.parametrize(
    ("model", "strategy", "said"),
    [
        (network, GPM, "strategy=<class .*GPM'>: give an object"),
        (network, "gpm", "strategy='gpm': give an object"),
        (lambda: nn.Linear, GPM(), "model=<class .*Linear'>: give a torch.nn.Module"),
    ],
)
def test_what_is_no_strategy_and_what_is_no_network(model, strategy, said):
    with pytest.raises(UsageError, match=said):
        Guarded(model(), strategy)


def test_classes_are_not_learned_from_tokens():
    tokens = torch.zeros(4, 6, dtype=torch.long)
    guard = Guarded(Tokens(), LwF(), forward=lambda model, batch: model(batch["input_ids"]))
    with (
        pytest.raises(UsageError, match="LwF learns classes, a label y for each sample"),
        guard.task(sample={"input_ids": tokens, "labels": tokens}),
    ):
        pass


def test_blocks_are_those_of_the_model_that_a_module_holds():
    config = LlamaConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    llama = LlamaForCausalLM(config)
    held = nn.Sequential(nn.Sequential(llama))
    for model in (llama, held):
        assert Guarded(model, Freeze(n_blocks=1)).learner.blocks() == list(llama.model.layers)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(17, 6)
        self.out = nn.Linear(6, 10)

    def forward(self, tokens):
        return self.out(self.embedding(tokens)).mean(1)


def test_padding_is_not_remembered():
    model, (x, y) = Tokens(), data(0)
    tokens = (x.flatten(1) * 4).long().clamp(0, 15)
    padded = torch.cat([tokens, torch.full_like(tokens, 16)], dim=1)
    mask = torch.cat([torch.ones_like(tokens), torch.zeros_like(tokens)], dim=1)
    protect = Protect(exclude=("embedding",), bias="free")
    guard = Guarded(
        model,
        GPM(protect=protect),
        forward=lambda model, batch: model(batch["input_ids"]),
    )
    optimizer = SGD(model.out.parameters(), lr=0.1)
    with guard.task(optimizer, sample={"input_ids": padded, "attention_mask": mask}):
        F.cross_entropy(model(padded), y).backward()
        optimizer.step()
    assert guard.strategy.rows_per_sample["out"] == tokens.shape[1]


def test_scaled_projection_is_served():
    model, strategy = network(), SGP(threshold=0.97)
    optimizer = Adam(model.parameters(), lr=2e-3)
    guarded = second_task(model, optimizer, strategy)
    model = network()
    free = Guarded(model, Finetune())
    optimizer = Adam(model.parameters(), lr=2e-3)
    with free.task(optimizer, sample=data(0)):
        loop(model, optimizer, 0)
    first = {name: M[:, : len(strategy.importance[name])] for name, M in strategy.memory.items()}
    before = matrices(model)
    with free.task(optimizer, sample=data(1)):
        loop(model, optimizer, 1)
    loose = leaks(first, before, matrices(model))
    assert all(guarded[name] < 0.7 * loose[name] for name in guarded)


def test_companions_that_need_nothing_are_served():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    gpm = GPM()
    guard = Guarded(model, Together({"gpm": gpm, "freeze": Freeze(n_blocks=1)}))
    with guard.task(optimizer, sample=data(0)):
        loop(model, optimizer, 0, epochs=1)
    memory, before = dict(gpm.memory), matrices(model)
    with guard.task(optimizer, sample=data(1)):
        loop(model, optimizer, 1, epochs=1)
    after = matrices(model)
    frozen = [name for name in before if torch.equal(before[name], after[name])]
    assert len(frozen) == 1
    moved = {name: M for name, M in memory.items() if name not in frozen}
    assert moved
    assert all(leak < 1e-5 for leak in leaks(moved, before, after).values())


x_of_two = torch.zeros(2, 1, 8, 8)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ((x_of_two, torch.zeros(3)), "as many rows"),
        (x_of_two[:0], "as many rows"),
        ([1, 2], "give tensors"),
        ((x_of_two, x_of_two, x_of_two), "give tensors"),
        (torch.zeros(2, 3), "does not take the sample"),
        ({"input_ids": torch.zeros(2, 64)}, "forward=lambda"),
    ],
)
def test_samples_that_do_not_fit(sample, message):
    model = network()
    found = condition(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(UsageError, match=message),
        Guarded(model, GPM()).task(optimizer, sample=sample),
    ):
        pytest.fail("entered")
    assert condition(model) == found
    with pytest.raises(UsageError, match=message):
        trainer(ContinualCallback(GPM(), sample=sample, task=0)).fit(
            Module(model, OPTIMIZERS["SGD"]), loader(0)
        )


def test_named_samples_and_other_ways_to_call():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    guard = Guarded(model, GPM(), forward=lambda model, batch: model(batch["pixels"]))
    with guard.task(optimizer, sample={"pixels": data(0)[0]}):
        loop(model, optimizer, 0, epochs=1)
    assert set(guard.strategy.memory) == {"1", "3"}


def test_optimizers_that_the_guard_cannot_see():
    model = network()
    optimizer, other = SGD(model.parameters(), lr=0.1), Adam(model.parameters())
    guard = Guarded(model, GPM())
    foreign = SGD(network().parameters(), lr=0.1)
    for given, message in (
        ((model,), "no torch.optim.Optimizer"),
        ((foreign,), "none of the model's parameters"),
    ):
        with pytest.raises(UsageError, match=message), guard.task(*given, sample=data(0)):
            pytest.fail("entered")
    with pytest.raises(UsageError, match="was not given"), guard.task(optimizer, sample=data(0)):
        loop(model, other, 0)
    with (
        pytest.raises(UsageError, match="no given optimizer"),
        guard.task(optimizer, sample=data(0)),
    ):
        pass
    with (
        pytest.raises(UsageError, match="open already"),
        guard.task(optimizer, sample=data(0)),
        guard.task(optimizer, sample=data(0)),
    ):
        pytest.fail("entered")
    assert hooks(optimizer) == hooks(other) == 0
    assert guard.tasks == 0
    with guard.task(optimizer, other, sample=data(0)):
        loop(model, optimizer, 0, epochs=1)
        loop(model, other, 0, epochs=1)
        foreign.step()


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another one, as many libraries have them."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        return self.inner.step(closure)


def test_an_optimizer_around_the_given_one_is_seen_through():
    model = network()
    inner = SGD(model.parameters(), lr=0.1)
    strategy = GPM()
    guard = Guarded(model, strategy)
    with guard.task(inner, sample=data(0)):
        loop(model, Wrapper(inner), 0, epochs=1)
    memory, before = dict(strategy.memory), matrices(model)
    with guard.task(inner, sample=data(1)):
        loop(model, Wrapper(inner), 1, epochs=1)
    assert all(leak < 1e-5 for leak in leaks(memory, before, matrices(model)).values())


def test_several_evaluations_a_step_are_refused():
    model = network()
    optimizer = LBFGS(model.parameters(), max_iter=4)
    with (
        pytest.raises(UsageError, match="several times a step"),
        Guarded(model, GPM()).task(optimizer, sample=data(0)),
    ):
        loop(model, optimizer, 0, closure=True)
    module = Module(network(), functools.partial(LBFGS, max_iter=4))
    with pytest.raises(UsageError, match="several times a step"):
        trainer(guard_of(GPM(), 0)).fit(module, loader(0))


def test_networks_that_cannot_be_guarded():
    normed = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(64, 10)))
    optimizer = SGD(normed.parameters(), lr=0.1)
    with (
        pytest.raises(UsageError, match="computes its weight"),
        Guarded(normed, GPM()).task(optimizer, sample=data(0)),
    ):
        pytest.fail("entered")
    with pytest.raises(UsageError, match="give the module itself"):
        Guarded(torch.compile(network(), backend="eager"), GPM())
    model = network()
    guard = Guarded(model, GPM(protect=Protect(heads="never")))
    optimizer = SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(UsageError, match="name them"),
        guard.task(optimizer, sample=data(0)),
    ):
        pytest.fail("entered")


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(8, 12, batch_first=True)
        self.out = nn.Linear(12, 10)

    def forward(self, x):
        return self.out(self.cell(x.squeeze(1))[0][:, -1])


def test_layers_that_stay_free_are_named_once():
    model = Recurrent()
    optimizer = SGD(model.parameters(), lr=0.1)
    guard = Guarded(model, GPM())
    with (
        pytest.warns(UserWarning, match=r"cell \(GRU\)"),
        guard.task(optimizer, sample=data(0)),
    ):
        loop(model, optimizer, 0, epochs=1)
    quiet = Guarded(model, GPM(protect=Protect(exclude=("cell",))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for g in (guard, quiet):
            with g.task(optimizer, sample=data(1)):
                loop(model, optimizer, 1, epochs=1)


def test_the_next_task_goes_on_from_the_checkpoint_of_the_one_before(tmp_path):
    module = Module(network(), OPTIMIZERS["Adam"])
    first = trainer(guard_of(GPM(threshold=0.97), 0))
    first.fit(module, loader(0))
    first.save_checkpoint(tmp_path / "first.ckpt")
    before = matrices(module)
    other, strategy = Module(network(), OPTIMIZERS["Adam"]), GPM(threshold=0.97)
    with pytest.raises(UsageError, match="max_epochs"):
        trainer(guard_of(strategy, 1)).fit(other, loader(1), ckpt_path=tmp_path / "first.ckpt")
    memory = dict(strategy.memory)
    trainer(guard_of(strategy, 1), epochs=4).fit(
        other, loader(1), ckpt_path=tmp_path / "first.ckpt"
    )
    assert max(leaks(memory, before, matrices(other)).values()) <= 1e-4


def test_a_checkpoint_of_the_last_epoch_is_enough_to_consolidate(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="last", every_n_epochs=1)
    made, strategy = Module(network(), OPTIMIZERS["Adam"]), GPM()
    trainer(guard_of(strategy, 0), keep, enable_checkpointing=True).fit(made, loader(0))
    resumed = GPM()
    again = trainer(guard_of(resumed, 0))
    again.fit(Module(network(), OPTIMIZERS["Adam"]), loader(0), ckpt_path=tmp_path / "last.ckpt")
    for name, M in strategy.memory.items():
        torch.testing.assert_close(M @ M.t(), resumed.memory[name] @ resumed.memory[name].t())


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_gradient_scaling(optimizer):
    model, strategy = network(), GPM(threshold=0.97)
    stepper = OPTIMIZERS[optimizer](model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    guard = Guarded(model, strategy)
    for t in range(2):
        (x, y), memory, before = data(t), dict(strategy.memory), matrices(model)
        with guard.task(stepper, sample=(x, y)):
            for i, rows in enumerate(torch.randperm(len(x)).split(32)):
                stepper.zero_grad()
                scaler.scale(F.cross_entropy(model(x[rows]), y[rows])).backward()
                if i == 3:
                    model[1].weight.grad[0, 0] = torch.inf  # the scaler leaves this step out
                scaler.step(stepper)
                scaler.update()
    assert max(leaks(memory, before, matrices(model)).values()) <= 1e-4


def test_weights_that_processes_share_out_are_refused():
    shared_out = types.SimpleNamespace(strategy=None)
    with pytest.raises(UsageError, match="devices=1"):
        guard_of(GPM(), 0).setup(shared_out, Module(network(), OPTIMIZERS["SGD"]), "fit")


def test_trainers_that_do_not_fit():
    module = Module(network(), OPTIMIZERS["SGD"])
    with pytest.raises(UsageError, match="'norm'"):
        trainer(guard_of(GPM(), 0), gradient_clip_val=0.1, gradient_clip_algorithm="value").fit(
            module, loader(0)
        )
    done = guard_of(GPM(), 0)
    trainer(done, epochs=1).fit(module, loader(0))
    with pytest.raises(UsageError, match="is learned"):
        trainer(done, epochs=1).fit(module, loader(0))


def test_compiled_networks_keep_their_norms():
    model = normalised()
    compiled = torch.compile(model, backend="eager")
    optimizer = Adam(model.parameters())
    guard = Guarded(model, GPM(threshold=0.97))
    with guard.task(optimizer, sample=data(0)):
        loop(compiled, optimizer, 0, epochs=1)
    before = {name: v.clone() for name, v in model[1].state_dict().items()}
    with guard.task(optimizer, sample=data(1)):
        loop(compiled, optimizer, 1, epochs=1)
    assert all(torch.equal(before[name], v) for name, v in model[1].state_dict().items())
