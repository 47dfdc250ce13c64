"""Every adapter's yaml, tiny transformers of four kinds, and tasks learned in a plain loop."""

import functools
from dataclasses import dataclass
from typing import Any

import texts
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.optim import SGD, AdamW

from cl_bench.cli.folders import conf_directory
from cl_bench.contracts import Origin, Strategy, generator
from cl_bench.experiment import Together, seed_training
from cl_bench.learners import Classifier, language
from cl_bench.models import t5
from cl_bench.models.encoder import Encoder
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.tasks.tensors import from_tensors

CONF = conf_directory() / "adapter"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml") if not path.stem.startswith("_"))

WIDTH = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
SAMPLES, CLASSES = 24, 3


def settings(name):
    """The options of a yaml with those that it inherits."""
    own = OmegaConf.load(CONF / f"{name}.yaml")
    own.pop("defaults")
    return OmegaConf.merge(OmegaConf.load(CONF / "_base.yaml"), own)


def adapter(name, **options):
    cfg = settings(name)
    few = {"samples": 8} if cfg.samples is not None else {}
    return instantiate(OmegaConf.merge(cfg, few, options), _convert_="all")


class Tokens(Encoder):
    """Reads token ids that a stream of tensors gives as other numbers."""

    def forward(self, x):
        return super().forward(x.long())


def vit():
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(**WIDTH, image_size=8, patch_size=4, num_channels=3), False)
    return Encoder(model, "cls", Origin("made up", "none", "none"), "")


def bert():
    from transformers import BertConfig, BertModel

    config = BertConfig(**WIDTH, vocab_size=40, max_position_embeddings=16)
    return Tokens(BertModel(config, False), "mean", Origin("made up", "none", "none"), "")


def llama(size):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**WIDTH, vocab_size=size, num_key_value_heads=2)
    return LlamaForCausalLM(config)


def classes(images):
    """Two tasks of three classes, each with the other's head at hand."""
    tasks = []
    for t in range(2):
        rng = generator(0, "adapters", t)
        y = torch.arange(SAMPLES) % CLASSES
        if images:
            x = torch.randn(CLASSES, 3, 8, 8, generator=rng)[y]
            x = x + 0.3 * torch.randn(x.shape, generator=rng)
        else:
            x = torch.randint(1, 40, (CLASSES, 6), generator=rng)[y].float()
        tasks.append({"train": (x, y), "validation": (x, y), "test": (x, y)})
    return from_tensors(tasks, "task", labels="task")


def make_learner(kind, lr=0.05):
    torch.manual_seed(1)
    if kind in ("vit", "bert"):
        stream = classes(kind == "vit")
        network = vit() if kind == "vit" else bert()
        return stream, Classifier(stream, network, functools.partial(SGD, lr=lr), 8, 0)
    stream = texts.make_stream(length=32, answer=11)
    size = len(stream.vocabulary)
    if kind == "t5":
        network = t5(size, depth=1, width=16, heads=2, feed_forward=32, tied=False)
    else:
        network = llama(size)
    return stream, language(stream, network, functools.partial(AdamW, lr=lr / 10), 4, 0)


@dataclass
class Setting:
    """A learner, the strategy that trains its adapters, and what it learns."""

    stream: Any
    learner: Any
    adapter: Any
    strategy: Strategy

    def batch(self, t=0):
        return self.stream[t].train[torch.arange(4)]

    @torch.no_grad()
    def outputs(self, t=0):
        """What the output layer reads, in evaluation mode."""
        with self.learner.evaluating():
            return self.learner.features(self.batch(t))

    @torch.no_grad()
    def bare(self, t=0):
        """The same without adapters."""
        with self.learner.evaluating():
            return self.learner.features(self.batch(t), bare=True)

    def begin(self, t):
        """As the engine begins a task."""
        seed_training(t)
        self.learner.begin(self.stream[t], self.strategy)
        self.learner.train()
        return self.learner.configure_optimizers()

    def step(self, t, i, optimizer):
        data = self.stream[t].train
        batch = data[torch.arange(4 * i, 4 * i + 4) % len(data)]
        optimizer.zero_grad()
        self.learner.training_step(batch, i).backward()
        self.strategy.constrain(self.learner)
        optimizer.step()

    def end(self, t):
        task = self.stream[t]
        self.strategy.consolidate(self.learner, task, self.strategy.collect(self.learner, task))
        self.strategy.release(self.learner)

    def learn(self, t, steps=3):
        optimizer = self.begin(t)
        for i in range(steps):
            self.step(t, i, optimizer)
        self.end(t)

    def saved(self):
        return {
            "weights": {k: v.detach().clone() for k, v in self.learner.weights().items()},
            "strategy": self.strategy.state_dict(),
            "learner": self.learner.progress_state(),
        }

    def load(self, state):
        self.strategy.load_state_dict(state["strategy"])
        self.learner.load_weights(state["weights"])
        self.learner.load_progress_state(state["learner"])


def setting(name, kind="bert", trained=None, lr=0.05, **options):
    stream, learner = make_learner(kind, lr)
    made = adapter(name, **options)
    strategy = Together({"adapter": made, "finetune": trained or Finetune()})
    strategy.check(learner)
    return Setting(stream, learner, made, strategy)
