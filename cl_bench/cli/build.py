"""The parts of a run from its configuration: stream, strategy, model, schedule, Trainer."""

from collections.abc import Callable
from typing import Any

import torch
from hydra.utils import instantiate
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn
from torch.optim import SGD

from cl_bench.cli.foreign import refuse_foreign
from cl_bench.cli.kinds import require_made
from cl_bench.cli.objects import (
    as_values,
    build,
    checked_options,
    explained,
    plain,
    refuse_given,
    target_of,
)
from cl_bench.contracts import Strategy, Stream, UsageError
from cl_bench.contracts.options import shown
from cl_bench.experiment import PerStep, Plateau, Together, quiet_lightning
from cl_bench.features import Backbone

__all__ = [
    "build",
    "build_backbone",
    "build_model",
    "build_schedule",
    "build_strategy",
    "build_stream",
    "build_trainer",
    "on_cuda",
    "trainer_options",
]

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
"""What the Trainer must leave to the record and the progress display."""


def trainer_options(cfg: DictConfig, deterministic: bool) -> DictConfig:
    """The Trainer's own options, checked.

    Raises:
        UsageError: one of them is not what it must be, or would take over what is ours.
    """
    options = OmegaConf.merge(cfg, {"deterministic": True} if deterministic else {})
    assert isinstance(options, DictConfig)
    with open_dict(options):
        options.pop("threads", None)  # ours, not Lightning's
        options.pop("masters", None)
    refuse_foreign(options)
    with explained(options):
        checked_options(target_of(options), options)
    return options


def build_stream(cfg: DictConfig, strategy: Strategy) -> Stream:
    """The stream that a configuration names.

    Where it leaves open whether the task id is known at test time (``task_id_at_test: null``), a
    strategy that needs it is given it, and every score says so.
    """
    left_open = "task_id_at_test" in cfg and cfg.task_id_at_test is None
    told = {"task_id_at_test": True} if left_open and strategy.needs.task_id_at_test else {}
    stream: Stream = build(cfg, **told)
    return stream


def build_backbone(cfg: DictConfig) -> Backbone:
    """The frozen network that a configuration names: the same in every run, whatever its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone: Backbone = build(cfg)
    return backbone


def build_model(cfg: DictConfig, stream: Stream) -> nn.Module:
    """The network that a configuration names, for what a stream gives."""
    model: nn.Module = build(cfg, input_shape=stream.input_shape, vocabulary=sum(stream.heads))
    return model


def build_strategy(
    cfg: DictConfig, name: str, given: Strategy | None, adapter: str = "adapter"
) -> tuple[Strategy, str]:
    """The strategy with its companions and its adapter, and what they are called together.

    Args:
        cfg: of the run.
        name: of the strategy.
        given: in its place, an object.
        adapter: name of the adapter, if there is one.
    """
    members = {name: build(cfg.strategy) if given is None else given}
    for companion, node in (cfg.get("also") or {}).items():
        if companion in members:
            raise UsageError(f"+also={companion}: the strategy is {name!r} already")
        members[str(companion)] = build(node)
    if cfg.get("adapter") is not None:
        if adapter in members:
            raise UsageError(f"adapter={adapter}: the strategy is called that too")
        members[adapter] = build(cfg.adapter)
        # Attached before, and taken off after, whatever trains it; in front for that alone.
        first = {adapter: members[adapter], **members}
        return Together(first), "+".join(members)
    if len(members) == 1:
        return members[name], name
    return Together(members), "+".join(members)


def build_schedule(cfg: DictConfig) -> Plateau | PerStep | Callable[..., Any] | None:
    """What becomes of the rate within a task, tried once; None where the group is empty."""
    if "_target_" not in cfg:
        for key, value in plain(cfg).items():
            raise UsageError(
                f"schedule.{key}={shown(value)}: has no effect, as no schedule is chosen; add "
                "schedule=..., for example schedule=cosine"
            )
        return None
    if not cfg.get("_partial_"):
        return build(cfg)  # type: ignore[no-any-return]
    with explained(cfg):
        checked_options(target_of(cfg), cfg)
        refuse_given(cfg, ["optimizer"])
        factory = instantiate(cfg, _partial_=True, _convert_="all")
        with as_values():
            require_made(factory(SGD([nn.Parameter()], lr=1.0)), cfg)
    return factory  # type: ignore[no-any-return]


def build_trainer(cfg: DictConfig) -> Callable[..., Any]:
    """The factory, tried once: an accelerator that is not there shows before any work."""
    with explained(cfg):

        def factory(**more: Any) -> Trainer:
            # Anew every time: a plugin or strategy that _target_ names serves one Trainer.
            make: Any = instantiate(cfg, _partial_=True, _convert_="all", **QUIET)
            return make(**more)  # type: ignore[no-any-return]

        try:
            with quiet_lightning():
                require_made(factory(), cfg)
        except MisconfigurationException as error:
            raise ValueError(str(error)) from None
    return factory


def on_cuda(trainer: DictConfig) -> bool:
    """Whether the Trainer's options lead to a GPU here."""
    return trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
