"""A ViT of two blocks for toy streams, and what is asked of all that works inside its blocks."""

import functools

import torch
from torch import nn
from torch.optim import SGD
from toys import make_engine, make_stream

from cl_bench.learners import Classifier
from cl_bench.models import ViT
from cl_bench.strategies.blocks.coda_prompt import CODAPrompt
from cl_bench.strategies.blocks.dualprompt import DualPrompt
from cl_bench.strategies.blocks.ease import EASE
from cl_bench.strategies.blocks.l2p import L2P
from cl_bench.strategies.replay.slca import SLCA

WIDTH = 8

MADE = {
    "ease": lambda: EASE(r=2),
    "slca": lambda: SLCA(rate=0.05, epochs=2, each=8),
    "coda_prompt": lambda: CODAPrompt(components=2, blocks=[0, 1]),
    "l2p": lambda: L2P(size=4, length=2, top=2),
    "dualprompt": lambda: DualPrompt(general_blocks=[0], expert_blocks=[1]),
}


def vit():
    torch.manual_seed(1)
    return nn.Sequential(nn.Unflatten(1, (3, 2, 2)), ViT((3, 2, 2), 1, 2, WIDTH, 2))


def double(tasks=3, scenario="class"):
    stream = make_stream(scenario, tasks=tasks)
    for task in stream:
        task.data.tensors["x"] = task.data.tensors["x"].double()
    return stream


def make_learner(stream, rate=0.1):
    learner = Classifier(stream, vit(), functools.partial(SGD, lr=rate), 10, 0).double()
    learner.remember_initial_state()
    return learner


def learned(strategy, tasks=3, rate=0.1, epochs=1, stream=None, after=None):
    """Learner and stream when the tasks are learned; ``after`` is called behind each."""
    stream = stream or double(tasks)
    learner = make_learner(stream, rate)
    strategy.check(learner)
    engine = make_engine(learner, strategy, epochs)
    for t in range(len(stream)):
        engine.learn(stream[t], strategy.plan(stream, t))
        learner.eval()
        if after is not None:
            with torch.no_grad():
                after(learner, stream, t)
    return learner, stream


def union(stream):
    batches = [task.everything for task in stream]
    return {k: torch.cat([b[k] for b in batches]) for k in ("x", "y")}
