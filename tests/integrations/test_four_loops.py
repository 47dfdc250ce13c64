"""One strategy of each kind, on three networks, in four loops: our engine's weights, or refused."""

import copy
import functools

import lightning
import pytest
import texts
import torch
import torch.nn.functional as F  # noqa: N812
from accelerate import Accelerator
from loops import own_cache, trainer  # noqa: F401
from torch import nn
from torch.optim import SGD
from torch.utils.data import SequentialSampler
from toys import make_engine
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTModel,
)

from cl_bench.contracts import UsageError, generator
from cl_bench.experiment import TrainLoader
from cl_bench.integrations import ContinualCallback, GuardCallback, Guarded
from cl_bench.learners import Causal, Classifier
from cl_bench.strategies.distillation.lwf import LwF
from cl_bench.strategies.isolation.freeze import Freeze
from cl_bench.strategies.lowrank.o_lora import OLoRA
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.replay.er import ER
from cl_bench.strategies.svd.adaptive_svd import AdaptiveSVD
from cl_bench.tasks.tensors import from_tensors

pytestmark = pytest.mark.slow

BATCH, SAMPLES, RATE = 8, 32, 0.02
ENOUGH = 1e-5

KINDS = {
    "projection": lambda: GPM(threshold=0.97, samples=16),
    "penalty": lambda: EWC(10.0, samples=8),
    "replay": lambda: ER(16),
    "svd": lambda: AdaptiveSVD(),
    "lora": lambda: OLoRA(rank=2, dropout=0.0, lambda2=0.01, targets="all"),
    "freeze": lambda: Freeze(n_blocks=1),
    "head": lambda: LwF(),
}
NETWORKS = ("conv", "vit", "llama")
LOOPS = ("plain", "lightning", "transformers", "accelerate")


class Features(nn.Module):
    """A tiny ViT up to its class token."""

    def __init__(self):
        super().__init__()
        config = ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
            num_channels=2,
            hidden_dropout_prob=0.0,
        )
        self.vit = ViTModel(config, add_pooling_layer=False)

    @property
    def blocks(self):
        return [
            m
            for stack in self.modules()
            if isinstance(stack, nn.ModuleList) and len(stack) == 2
            for m in stack
        ]

    def forward(self, x):
        return self.vit(pixel_values=x).last_hidden_state[:, 0]


def convolutional():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Flatten(),
    )


@functools.cache
def images():
    tasks = []
    for t in range(2):
        rng = generator(0, "four", t)
        y = torch.arange(SAMPLES) % 3
        x = torch.randn(3, 2, 8, 8, generator=rng)[y] + 0.3 * torch.randn(
            SAMPLES, 2, 8, 8, generator=rng
        )
        tasks.append((x, y))
    return from_tensors(tasks, "domain")


@functools.cache
def stories():
    return texts.make_stream(length=24, answer=11)


def learner_of(network):
    """Ours, whose network the stranger takes."""
    torch.manual_seed(1)
    factory = functools.partial(SGD, lr=RATE)
    if network == "llama":
        config = LlamaConfig(
            vocab_size=len(stories().vocabulary),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
        return Causal(stories(), LlamaForCausalLM(config), factory, BATCH, 0)
    backbone = convolutional() if network == "conv" else Features()
    return Classifier(images(), backbone, factory, BATCH, 0)


class Somebodys(nn.Module):
    """A body and a head; in Hugging Face's Trainer with a loss."""

    def __init__(self, learner):
        super().__init__()
        self.body, self.head = learner.backbone, learner.heads[0]

    def forward(self, x=None, y=None, pixel_values=None, labels=None):
        x = pixel_values if x is None else x
        out = self.head(self.body(x))
        if labels is None:
            return out
        return {"loss": F.cross_entropy(out, labels), "logits": out}


def batches(stream, t, learner):
    """Of one epoch, as our loader gives them; of text, prompts with their answers behind."""
    loader = TrainLoader(stream[t].train, BATCH, 0, t)
    if stream is not stories():
        return [{"x": b["x"], "y": b["y"]} for b in loader]
    found = []
    for batch in loader:
        uncut, learner._uncut = learner._uncut, True
        joined = learner.joined(batch)
        learner._uncut = uncut
        found.append({k: joined[k] for k in ("input_ids", "attention_mask", "labels")})
    return found


def whole(stream, t, learner):
    """All samples, in order."""
    batch = stream[t].train[torch.arange(len(stream[t].train))]
    if stream is not stories():
        return {"x": batch["x"], "y": batch["y"]}
    uncut, learner._uncut = learner._uncut, True
    joined = learner.joined(batch)
    learner._uncut = uncut
    return {k: joined[k] for k in ("input_ids", "attention_mask", "labels")}


@functools.cache
def ours(kind, network):
    """The network's weights after two tasks of our engine, or why there are none."""
    learner, strategy = learner_of(network), KINDS[kind]()
    stream = learner.prompts if network == "llama" else images()
    if network != "llama" and strategy.needs.modalities == {"text"}:
        return None
    if network == "llama" and strategy.needs.modalities and "text" not in strategy.needs.modalities:
        return None
    engine = make_engine(learner, strategy, epochs=1, batch_size=BATCH)
    for t in range(2):
        engine.learn(stream[t], strategy.plan(stream, t))
    return {k: v.detach().clone() for k, v in net_of(learner, network).state_dict().items()}


def net_of(learner, network):
    return learner.model if network == "llama" else Somebodys(learner)


def step(guard, model, optimizer, batch, backward):
    model.train()
    batch = guard.on_batch(batch)
    text = "input_ids" in batch
    out = model(input_ids=batch["input_ids"]).logits if text else model(batch["x"])
    optimizer.zero_grad()
    backward(guard.objective(batch, out) + guard.penalty(batch, out))
    optimizer.step()


def plain(guard, model, learner, stream):
    for t in range(2):
        with guard.task(sample=whole(stream, t, learner), epochs=1):
            optimizer = SGD(guard.param_groups(), lr=RATE)
            for batch in batches(stream, t, learner):
                step(guard, model, optimizer, batch, lambda loss: loss.backward())
            guard.after_epoch()


def accelerate(guard, model, learner, stream):
    accelerator = Accelerator(cpu=True)
    for t in range(2):
        with guard.task(sample=whole(stream, t, learner), epochs=1):
            made = SGD(guard.param_groups(), lr=RATE)
            trained, optimizer = accelerator.prepare(model, made)
            for batch in batches(stream, t, learner):
                step(guard, trained, optimizer, batch, accelerator.backward)
            guard.after_epoch()


class Module(lightning.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        if "x" in batch:
            return F.cross_entropy(self(batch["x"]), batch["y"])
        logits, labels = self(batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=RATE)


class Whole:
    """Batches that are made already."""

    def __init__(self, made):
        self.made = made

    def __len__(self):
        return len(self.made)

    def __iter__(self):
        return iter(self.made)


def in_lightning(guard, module, learner, stream):
    for t in range(2):
        callback = ContinualCallback(guard, sample=whole(stream, t, learner))
        trainer(callback, epochs=1).fit(module, Whole(batches(stream, t, learner)))


class InOrder(Trainer):
    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def transformers(guard, model, learner, stream, directory):
    names = {"x": "pixel_values", "y": "labels"}
    for t in range(2):
        rows = [
            {names.get(k, k): v[i] for k, v in batch.items()}
            for batch in batches(stream, t, learner)
            for i in range(len(next(iter(batch.values()))))
        ]
        sample = {names.get(k, k): v for k, v in whole(stream, t, learner).items()}
        callback = GuardCallback(guard, sample=sample)
        arguments = TrainingArguments(
            output_dir=str(directory),
            use_cpu=True,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            optim="sgd",
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        loop = InOrder(model=model, args=arguments, train_dataset=rows, callbacks=[callback])
        callback.attach(loop)
        loop.train()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_makes_the_weights_of_our_engine(kind, network, loop, tmp_path, monkeypatch):
    wanted = ours(kind, network)
    if wanted is None:
        pytest.skip("the strategy is for another kind of data")
    learner, strategy = learner_of(network), KINDS[kind]()
    stream = learner.prompts if network == "llama" else images()
    model = net_of(learner, network)
    start = copy.deepcopy(model.state_dict())
    guarded = Module(model) if loop == "lightning" else model
    heads = () if network == "llama" else ["network.head" if loop == "lightning" else "head"]
    if network == "llama" and loop == "lightning":
        heads = ["network.lm_head"]
    loss = None if network == "llama" else F.cross_entropy
    forward = None
    if network == "llama" and loop == "lightning":

        def forward(module, batch):
            return module(batch["input_ids"]).logits

    elif network != "llama":

        def forward(module, batch):
            return module(batch["x"])

    guard = Guarded(guarded, strategy, loss=loss, forward=forward, heads=heads)
    if kind == "lora":  # pairs are drawn from the global generator
        seed_as_our_engine(monkeypatch, guard)
    try:
        if loop == "transformers":
            transformers(guard, model, learner, stream, tmp_path)
        else:
            run = {"plain": plain, "accelerate": accelerate, "lightning": in_lightning}[loop]
            run(guard, guarded, learner, stream)
    except UsageError as refused:
        assert guard.tasks == 0, "refused in the middle"
        pytest.skip(f"refused at the start: {refused}")
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    moved = torch.stack([(wanted[k] - start[k]).norm() for k in wanted if floats(wanted[k])]).norm()
    gap = torch.stack([(found[k] - wanted[k]).norm() for k in wanted if floats(wanted[k])]).norm()
    size = torch.stack([v.norm() for v in wanted.values() if floats(v)]).norm()
    assert moved > 0
    assert gap < ENOUGH * size, f"{float(gap / size):.2g}"


def floats(value):
    return value.is_floating_point()


def seed_as_our_engine(monkeypatch, guard):
    from cl_bench.contracts import derive_seed

    opened = guard.opened

    def seeded(*given, **more):
        torch.manual_seed(derive_seed(0, "training", guard.tasks) % (1 << 32))
        return opened(*given, **more)

    monkeypatch.setattr(guard, "opened", seeded)
