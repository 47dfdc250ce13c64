"""From a composed configuration to a run."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hydra.errors import HydraException
from hydra.utils import get_object, instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from torch import nn

from cl_bench.contracts import Strategy, UsageError, derive_seed
from cl_bench.experiment import (
    AlignmentSettings,
    EvalSettings,
    Identity,
    LoopSettings,
    Result,
    Together,
    check_pair,
    check_trainer,
    conduct,
    quiet_lightning,
    seed_training,
)
from cl_bench.tracking import wandb_sink

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
"""What the Trainer must leave to the record and the progress display."""


def run_config(cfg: DictConfig, command: str, choices: Mapping[str, Any]) -> Result:
    """Run one experiment.

    Args:
        cfg: the composed configuration.
        command: the command line that leads to it.
        choices: which option of each group was chosen.

    Raises:
        UsageError: whatever the user can put right.
    """
    seed = cfg.seed
    if not isinstance(seed, int) or seed < 0:
        raise UsageError(f"seed={seed}: must be a whole number of at least 0")
    loop = LoopSettings(seed, cfg.batch_size, cfg.pack, cfg.num_workers)
    evaluation = EvalSettings(**cfg.eval)
    alignment = AlignmentSettings(**cfg.alignment)

    # Cheap things first: a threshold of 1.7 should not wait for the data.
    strategy, strategy_name = _strategy(cfg, str(choices.get("strategy", "strategy")))
    check_trainer(cfg.trainer, loop.pack, strategy)
    trainer = _trainer(cfg.trainer)
    optimizer = _optimizer(cfg.optimizer)
    stream = build(cfg.stream)
    stream_name = str(choices.get("stream", stream.name))
    check_pair(strategy_name, strategy, stream)

    seed_training(derive_seed(seed, "model"))
    model = build(cfg.model, input_shape=stream.input_shape)
    learner = build(
        cfg.learner,
        stream=stream,
        model=model,
        optimizer=optimizer,
        batch_size=loop.batch_size,
        seed=seed,
        pack=loop.pack,
    )
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    return conduct(
        stream,
        strategy,
        learner,
        trainer,
        Identity(stream_name, strategy_name, OmegaConf.to_yaml(cfg, resolve=True), command),
        loop=loop,
        evaluation=evaluation,
        alignment=alignment,
        run_dir=cfg.run_dir,
        sinks=[functools.partial(wandb_sink, config=settings, **cfg.logger)],
        environment={
            "processes": 1,
            "effective_batch": loop.batch_size * int(cfg.trainer.accumulate_grad_batches),
        },
    )


def build(cfg: DictConfig, **given: Any) -> Any:
    """Make what ``_target_`` names from its configuration and from objects that are at hand.

    Args:
        cfg: a node with ``_target_``.
        given: objects; those that the target does not ask for are left out.

    Raises:
        UsageError: the target does not exist, or refuses its arguments.
    """
    with _explained(cfg):
        accepted = inspect.signature(get_object(cfg._target_)).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        objects = {k: v for k, v in given.items() if takes_all or k in accepted}
        # Through _partial_, since Hydra would make a configuration of the objects.
        make = instantiate(cfg, _partial_=True, _convert_="all")
        return make(**objects)


@contextmanager
def _explained(cfg: DictConfig) -> Iterator[None]:
    """Turn what a constructor raises into one message that names the target."""
    try:
        yield
    except (TypeError, ValueError, ImportError, HydraException) as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UsageError):
                raise cause from None
            cause = cause.__cause__
        raise UsageError(f"cannot make {cfg.get('_target_')}: {error}") from error


def _strategy(cfg: DictConfig, name: str) -> tuple[Strategy, str]:
    members = {name: build(cfg.strategy)}
    for companion, node in (cfg.get("also") or {}).items():
        if companion in members:
            raise UsageError(f"+also={companion}: the strategy is {name!r} already")
        members[str(companion)] = build(node)
    if len(members) == 1:
        return members[name], name
    return Together(members), "+".join(members)


def _optimizer(cfg: DictConfig) -> Any:
    """The factory, tried once on a parameter of its own: a negative rate shows before any work."""
    with _explained(cfg):
        factory = instantiate(cfg, _partial_=True, _convert_="all")
        factory([{"params": [nn.Parameter()]}])
    return factory


def _trainer(cfg: DictConfig) -> Callable[..., Any]:
    """The factory, tried once: an accelerator that is not there shows before any work."""
    options: Any = {k: v for k, v in cfg.items() if k not in ("_target_", "_partial_")}
    owned = sorted(set(options) & {*QUIET, "callbacks"})
    if owned:
        raise UsageError(
            f"trainer.{owned[0]}: cl_bench sets it itself (its record, display and checkpoints "
            "take that place); leave it out"
        )
    with _explained(cfg):
        factory = instantiate(cfg, _partial_=True, _convert_="all", **QUIET)
        try:
            with quiet_lightning():
                factory()
        except MisconfigurationException as error:
            raise UsageError(f"the trainer refuses its settings: {error}") from error
    return factory  # type: ignore[no-any-return]
