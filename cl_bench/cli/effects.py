"""What was typed and cannot have an effect here: refused, since it would mislead."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from cl_bench.contracts import UsageError
from cl_bench.contracts.options import known, without_effect

TOP = (
    "seed", "run_dir", "batch_size", "pack", "widths", "num_workers", "deterministic", "search",
    "selected", "reference", "eval", "alignment", "probe", "checkpoint", "strategy", "stream",
    "model", "optimizer", "schedule", "learner", "trainer", "logger", "federation", "also",
)  # fmt: skip
"""What a configuration holds."""

IN_FEDERATIONS = ("pack", "num_workers", "trainer.", "eval.dense", "eval.dense_samples")
"""What is for runs of epochs; clients learn in a plain loop of their own."""


def check_effects(
    cfg: DictConfig, words: Sequence[str], kinds: Mapping[str, Callable[..., Any]]
) -> None:
    """Raise :class:`UsageError` if an override cannot have an effect.

    Args:
        cfg: the composed configuration.
        words: the overrides, as typed; what configuration files say is not looked at.
        kinds: what the nodes without ``_target_`` are made into.
    """
    typed = [word.lstrip("+").partition("=")[0] for word in words if not word.startswith("~")]
    _refuse_unknown(cfg)
    text = OmegaConf.to_yaml(cfg, resolve=False)
    if "widths" in typed and "${widths}" not in text:
        raise UsageError(
            f"widths={cfg.widths}: no effect, as this model does not take them; leave it out"
        )
    for key in typed:
        if "federation" in cfg and key != "trainer.accelerator":
            _refuse_in_federation(key, OmegaConf.select(cfg, key))
        _refuse_alone(cfg, key, kinds)


def _refuse_unknown(cfg: DictConfig) -> None:
    """A key of the user's own is fine where another value refers to it."""
    text = OmegaConf.to_yaml(cfg, resolve=False)
    for key in map(str, cfg):
        if key not in TOP and f"${{{key}" not in text and f":{key}" not in text:
            raise UsageError(
                f"{key}={cfg[key]}: there is no such setting, and no other refers to it."
                f"{known(key, TOP)}"
            )


def _refuse_in_federation(key: str, value: Any) -> None:
    if any(key == name or (name[-1] == "." and key.startswith(name)) for name in IN_FEDERATIONS):
        raise UsageError(
            f"{key}={value}: has no effect in a federation, whose clients learn in a plain loop "
            "without a Trainer; leave it out"
        )


def _refuse_alone(cfg: DictConfig, key: str, kinds: Mapping[str, Callable[..., Any]]) -> None:
    """An option that does something only beside another value of a second one."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else None
    if not isinstance(node, DictConfig):
        return
    made = get_object(node._target_) if "_target_" in node else kinds.get(parent)
    if made is None or name not in inspect.signature(made).parameters:
        return
    values: Any = OmegaConf.to_container(node, resolve=True)
    for option, needed in without_effect(made, values, [name]):
        raise UsageError(
            f"{parent}.{option}={node[option]}: has no effect without {parent}.{needed}; leave "
            "one out or add the other"
        )
