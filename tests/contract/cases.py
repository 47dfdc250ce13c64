"""Every strategy as tiny runs of two tasks: which stream, network and engine follow from its needs.

A case is known by a name, so that another process can make it too: that of a yaml in
``conf/strategy``, or of a class in ``broken.py``.
"""

import functools
import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import texts
import torch
import torch.distributed as dist
from dying import Dying
from hydra.errors import HydraException
from hydra.utils import instantiate
from lightning import Trainer
from omegaconf import OmegaConf
from torch import nn
from torch.optim import SGD, AdamW
from toys import Silent

from cl_bench.cli.folders import conf_directory
from cl_bench.contracts import UsageError, generator
from cl_bench.experiment import (
    AlignmentSettings,
    CheckpointSettings,
    EvalSettings,
    Identity,
    LightningEngine,
    LoopSettings,
    Plateau,
    check_pair,
    check_schedule,
    check_tasks,
    check_trainer,
    conduct,
)
from cl_bench.federation import FederatedEngine, Federation, check_federation
from cl_bench.learners import Classifier, language
from cl_bench.models import MLP, ViT, t5
from cl_bench.streaming import Streaming, StreamingEngine, check_streaming
from cl_bench.tasks.tensors import from_tensors

CONF = conf_directory() / "strategy"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))

SAMPLES, DIM, CLASSES, FEW = 64, 12, 3, 24

TRANSFORMERS = ("aper_adapter", "coda_prompt", "dualprompt", "ease", "l2p")
"""Strategies that work inside a transformer's blocks."""

LINEAR = {"targets": ["linear"]}
OPTIONS: dict[str, dict[str, Any]] = {
    "bic": {"epochs": 5},
    **dict.fromkeys(("inflora", "keeplora", "sd_lora"), LINEAR),
    "coda_prompt": {"blocks": [0, 1]},
    "dualprompt": {"general_blocks": [0], "expert_blocks": [1]},
}
"""Options that a strategy needs for runs as small as these; best none."""


WARM = Streaming(warmup=16)


class RefusedError(Exception):
    """A run was refused before any work: that is within the law."""


def settings(name):
    """The options of a yaml with those it is based on."""
    own = OmegaConf.load(CONF / f"{name}.yaml")
    bases = [base for base in own.pop("defaults", []) if base != "_self_"]
    return OmegaConf.merge(*(based(base) for base in bases), own)


def based(base):
    """What an entry of a yaml's defaults stands for: a strategy, or a part, /group@key: name."""
    if isinstance(base, str):
        return settings(base)
    ((place, name),) = base.items()
    group, _, key = place.partition("@")
    return {key: OmegaConf.load(CONF.parent / group.strip("/") / f"{name}.yaml")}


def small(options, calm):
    """For few samples; ``calm`` without dropout, whose masks depend on how a batch is cut."""
    found = {}
    for key, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if "samples" in key or key == "memory":
            found[key] = min(value, FEW)
        if key in ("rank", "r", "each", "components"):
            found[key] = min(value, 2)
        if key == "width":
            found[key] = min(value, FEW)
        if key == "dropout" and calm:
            found[key] = 0.0
    return found


def make_strategy(name, calm=True):
    if name not in NAMES:
        import broken
        import seams

        return getattr(seams if name in seams.SEAMS else broken, name)()
    cfg = settings(name)
    return instantiate(
        OmegaConf.merge(cfg, small(cfg, calm), OPTIONS.get(name, {})), _convert_="all"
    )


def reads_text(strategy):
    return "text" in strategy.needs.modalities  # though it may read more


def make_stream(strategy):
    """Two tasks: Gaussian classes in a few directions of each task, or toy texts."""
    if reads_text(strategy):
        stream = texts.make_stream(length=32, answer=11)
        stream.task_id_at_test = strategy.needs.task_id_at_test
        return stream
    tasks = []
    for t in range(2):
        rng = generator(0, "laws", t)
        y = torch.arange(SAMPLES) % CLASSES
        z = (2 * torch.randn(CLASSES, 4, generator=rng))[y]
        z = z + 0.3 * torch.randn(SAMPLES, 4, generator=rng)
        x = z @ torch.linalg.qr(torch.randn(DIM, 4, generator=rng))[0].t()
        tasks.append({"train": (x, y), "validation": (x[:16], y[:16]), "test": (x[:32], y[:32])})
    wanted = sorted(strategy.needs.scenarios or {"domain"})[0]
    scenario = "task" if strategy.needs.task_id_at_test else wanted
    return from_tensors(tasks, getattr(strategy, "scenario", scenario), labels="task")


def require_single(pack):
    """Of what the command line refuses nothing else does: a stream in packs."""
    if pack > 1:
        raise UsageError("a stream is met sample by sample")


class Mortal(Dying, Classifier):
    """May die."""


def make_learner(strategy, stream, batch, pack=1, dtype=torch.float64):
    if reads_text(strategy):
        optimizer = functools.partial(AdamW, lr=3e-3)
        torch.manual_seed(1)
        model = t5(len(stream.vocabulary), depth=1, width=16, heads=2, feed_forward=32, tied=False)
        learner = language(stream, model, optimizer, batch, 0, pack)
        learner.__class__ = type("Mortal", (Dying, type(learner)), {})
    else:
        torch.manual_seed(1)
        if type(strategy).__module__.split(".")[-1] in TRANSFORMERS:
            network = nn.Sequential(nn.Unflatten(1, (3, 2, 2)), ViT((3, 2, 2), 2, 2, 8, 2))
        else:
            network = nn.Sequential(MLP((DIM,), (16, 16), True), nn.Linear(16, 16), nn.ReLU())
        learner = Mortal(stream, network, functools.partial(SGD, lr=0.2), batch, 0, pack)
    learner.to(dtype)
    learner.remember_initial_state()
    if not reads_text(strategy):
        for task in stream:
            for data in (task.train, task.validation, task.test):
                data.tensors["x"] = data.tensors["x"].to(dtype)
    return learner


@dataclass
class Run:
    """What a run came to."""

    weights: dict
    state: dict
    matrix: torch.Tensor
    learner: Any = None
    strategy: Any = None
    stream: Any = None
    engine: Any = None
    directory: Any = None


class Setting:
    """The parts of a run of two tasks.

    Raises:
        RefusedError: they do not go together.
    """

    def __init__(
        self,
        name,
        cut=1,
        pack=1,
        accumulate=1,
        precision="32-true",
        dtype=torch.float64,
        calm=True,
        federated=None,
    ):
        self.name, self.pack = name, pack
        try:
            self.strategy = make_strategy(name, calm)
        except HydraException as error:
            if "pip install" not in str(error.__cause__):
                raise
            pytest.skip(str(error.__cause__))
        only = self.strategy.needs.engines == {"federated"}
        self.federated = only if federated is None else federated
        self.streaming = self.strategy.needs.engines == {"streaming"}
        self.stream = make_stream(self.strategy)
        self.batch = (4 if reads_text(self.strategy) else 16) // cut
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.options = {
            "accelerator": "cpu",
            "devices": world,
            "strategy": "ddp" if world > 1 else "auto",
            "max_epochs": 2,
            "accumulate_grad_batches": accumulate,
            "precision": precision,
        }
        self.schedule = Plateau() if self.strategy.needs.plateau else None
        self.federation = Federation(
            clients=4,
            per_round=2,
            rounds=3,
            statistics="sampled"
            if getattr(self.strategy, "collects_on", "global") == "local"
            else "all",
        )
        with refusals():
            check_pair(name, self.strategy, self.stream, self.federated, self.streaming)
            check_trainer(self.options, pack, self.strategy)
            check_schedule(self.strategy, self.schedule)
            check_tasks(self.stream, self.schedule is not None)
            if self.streaming:
                check_streaming(WARM, name, self.strategy, self.stream, self.options)
                require_single(pack)
            if self.federated:
                check_federation(
                    self.federation, name, self.strategy, self.stream, self.options, self.schedule
                )
            self.learner = make_learner(self.strategy, self.stream, self.batch, pack, dtype)
            self.strategy.check(self.learner)
        self.loop = LoopSettings(0, self.batch, pack, schedule=self.schedule)

    def trainer(self, **more):
        return Trainer(
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **{**self.options, **more},
        )

    @property
    def engine(self):
        if self.streaming:
            return functools.partial(StreamingEngine, streaming=WARM)
        if not self.federated:
            return LightningEngine
        return functools.partial(FederatedEngine, federation=self.federation)

    def silent_engine(self):
        """The inner loop, of which nothing is recorded."""
        return self.engine(
            self.learner, self.strategy, self.trainer, self.loop, None, Silent(), Silent()
        )

    def learn(self, engine, t):
        engine.learn(self.stream[t], self.strategy.plan(self.stream, t))

    def conduct(self, directory, every=None, resume=False):
        result = conduct(
            self.stream,
            self.strategy,
            self.learner,
            self.trainer,
            Identity("laws", self.name, "seed: 0\n", "python -m cl_bench"),
            loop=self.loop,
            evaluation=EvalSettings(),
            alignment=AlignmentSettings(enabled=False),
            checkpoint=CheckpointSettings(enabled=every is not None, every_steps=every or 1),
            run_dir=directory,
            resume=resume,
            engine=self.engine,
        )
        return Run(
            {k: v.detach().clone() for k, v in self.learner.weights().items()},
            self.strategy.state_dict(),
            torch.from_numpy(result.matrix),
            self.learner,
            self.strategy,
            self.stream,
            directory=directory,
        )


@contextmanager
def refusals():
    try:
        yield
    except UsageError as refusal:
        raise RefusedError(str(refusal)) from refusal


def relative_gap(one, other):
    """The largest relative difference of two sets of weights, tensor by tensor."""
    assert one.keys() == other.keys()
    gaps = []
    for name, right in other.items():
        left, right = one[name].double(), right.double()
        assert left.shape == right.shape, name
        gaps.append(float((left - right).norm() / right.norm().clamp(min=1e-9)))
    return max(g if math.isfinite(g) else math.inf for g in gaps)
