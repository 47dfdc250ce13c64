"""What each slot of a configuration may name: ``optimizer._target_`` makes an optimizer."""

import inspect
import types
import typing
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lightning import Trainer
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO, LayerSync, Precision
from lightning.pytorch.strategies import Strategy as Parallel
from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cl_bench.adapters import Adapter, Reparametrisation
from cl_bench.contracts import Protect, Strategy, Stream, UsageError
from cl_bench.experiment import PerStep, Plateau
from cl_bench.experiment.probes import Probe
from cl_bench.features import Backbone, BaseTraining
from cl_bench.federation import Federation
from cl_bench.learners import BaseLearner
from cl_bench.streaming import Streaming
from cl_bench.tasks.text import Prompt


@dataclass(frozen=True)
class Kind:
    """What a slot takes.

    Attributes:
        noun: for messages.
        classes: whose subclasses the slot takes, or functions that make their instances.
        inside: the same for objects among its arguments, where a record names them.
        beside: full names of more of those, in packages that may not be there.
    """

    noun: str
    classes: tuple[type, ...]
    inside: tuple[type, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[type, ...]:
        """What objects among its arguments may be."""
        found = list(self.inside)
        for name in self.beside:
            with suppress(ImportError):
                package, _, cls = name.rpartition(".")
                found.append(getattr(import_module(package), cls))
        return tuple(found)

    @property
    def names(self) -> str:
        """Of the classes."""
        return " or ".join(f"{c.__module__}.{c.__qualname__}" for c in self.classes)


SLOTS = {
    "strategy": Kind("a strategy", (Strategy,), (Protect,)),
    "stream": Kind("a stream", (Stream,), (Prompt,)),
    "model": Kind("a network", (nn.Module,), (nn.Module,)),
    "optimizer": Kind("an optimizer", (Optimizer,), (Optimizer,)),
    "schedule": Kind("a schedule", (Plateau, PerStep, LRScheduler), (LRScheduler,)),
    "learner": Kind("a learner", (BaseLearner,)),
    "trainer": Kind(
        "a Trainer",
        (Trainer,),
        (Parallel, Precision, ClusterEnvironment, CheckpointIO, LayerSync),
    ),
    "backbone": Kind("a backbone", (Backbone,), (nn.Module, BaseTraining)),
    "probe": Kind("a probe", (Probe,), (Probe,)),
    "adapter": Kind(
        "an adapter",
        (Adapter,),
        (Reparametrisation,),
        ("peft.PeftConfig", "peft.EvaConfig", "peft.tuners.lora.config.CordaConfig"),
    ),
    "logger": Kind("a logger", (Logger,), (Logger,)),
    "federation": Kind("a federation", (Federation,), (Optimizer,)),
    "engine": Kind("an engine's settings", (Streaming,)),
}
"""By top-level key of the configuration; nothing else in it is made from a ``_target_``."""


def kind_of(cfg: DictConfig) -> Kind | None:
    """Of the slot that a node of the whole configuration fills; None of any other node."""
    slot = (cfg._get_full_key(None) or "").partition(".")[0]
    return SLOTS["strategy"] if slot == "also" else SLOTS.get(slot)


def require_kind(target: Any, cfg: DictConfig) -> None:
    """Raise :class:`UsageError` if what ``_target_`` names cannot make what the slot takes.

    A function without a return annotation is given the chance: :func:`require_made` looks at what
    it has made.
    """
    kind = kind_of(cfg)
    if kind is None:
        return
    made = [target] if isinstance(target, type) else returned(target)
    related = any(issubclass(m, c) or issubclass(c, m) for m in made for c in kind.classes)
    wrong = not issubclass(target, kind.classes) if isinstance(target, type) else not related
    # Of C there are no factories of ours, and nothing says what they make.
    if (wrong and made) or inspect.isbuiltin(target):
        raise refused(cfg._get_full_key("_target_"), str(cfg._target_), kind)


def require_made(made: Any, cfg: DictConfig) -> None:
    """Raise :class:`UsageError` if a slot's target has made something else than the slot takes."""
    kind = kind_of(cfg)
    if kind is not None and not isinstance(made, kind.classes):
        raise UsageError(
            f"{refused(cfg._get_full_key('_target_'), str(cfg._target_), kind)} (it made a "
            f"{type(made).__name__})"
        )


def refused(key: str, name: str, kind: Kind) -> UsageError:
    """What to say about a target of another kind."""
    return UsageError(
        f"{key}={name}: makes no {kind.noun.partition(' ')[2]}; name a subclass of {kind.names}, "
        "or a function that returns one"
    )


def returned(function: Any) -> list[type]:
    """Classes in a function's return annotation; none where it does not say."""
    try:
        said = typing.get_type_hints(function).get("return")
    except (TypeError, NameError, AttributeError):
        return []
    parts = typing.get_args(said) if _is_union(said) else (said,)
    return [p for p in parts if isinstance(p, type) and p is not type(None)]


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)
