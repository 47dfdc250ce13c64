"""What was typed and cannot have an effect here: refused or warned about, since it would mislead.

Only the overrides of a run that begins are looked at, and the keys that files bring: in a recorded
configuration nothing refers to anything any more.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cl_bench.contracts import UsageError
from cl_bench.contracts.checking import without_effect
from cl_bench.contracts.options import known, shown

TOP = (
    "seed", "run_dir", "batch_size", "batch_tokens", "pack", "widths", "num_workers",
    "deterministic", "search", "selected", "reference", "eval", "alignment", "probe",
    "checkpoint", "strategy", "stream", "model", "optimizer", "schedule", "learner", "trainer",
    "logger", "federation", "backbone", "also", "engine", "adapter", "log_steps",
)  # fmt: skip
"""What a configuration holds."""

STEPS = (
    "trainer.max_epochs", "trainer.accumulate_grad_batches", "trainer.gradient_clip_val",
    "log_steps",
)  # fmt: skip
"""Settings of steps outside of ``optimizer`` and ``schedule``."""


def check_effects(cfg: DictConfig, words: Sequence[str]) -> list[str]:
    """Warnings about overrides that have no effect in this kind of run.

    Args:
        cfg: the composed configuration.
        words: the overrides, as typed.

    Raises:
        UsageError: nothing takes a key, or nothing takes ``widths`` that were typed.
    """
    if not words:
        return []
    text, typed = OmegaConf.to_yaml(cfg, resolve=False), _keys(words)
    for key in map(str, cfg):
        # A key of the user's own is fine where another value refers to it.
        if key not in TOP and f"${{{key}" not in text and f":{key}" not in text:
            value = OmegaConf.select(cfg, key)
            raise UsageError(
                f"{key}={value}: there is no such setting, and no other refers to it."
                f"{known(key, TOP)}"
            )
    if "widths" in typed and ":widths" not in text:
        raise UsageError(f"widths={cfg.widths}: no part of this model takes them; leave it out")
    where = {
        "federation": "a federation, whose clients learn in a plain loop without a Trainer",
        "engine": "a stream that is met once, in a plain loop without a Trainer",
    }
    told = next((said for name, said in where.items() if name in cfg), None)
    if told is None:
        return []
    return [
        f"warning: {key}={shown(OmegaConf.select(cfg, key))} has no effect in {told}"
        for key in typed
        if key in ("pack", "log_steps")
        or (key.startswith("trainer.") and key != "trainer.accelerator")
    ]


def check_beside(
    cfg: DictConfig, words: Sequence[str], made: Mapping[str, Callable[..., Any]]
) -> None:
    """Raise :class:`UsageError` if an option does nothing beside what another one says.

    Args:
        cfg: the composed configuration.
        words: the overrides, as typed.
        made: what parts of the configuration are made into, by their place in it.
    """
    for key in _keys(words):
        place, _, name = key.rpartition(".")
        if place not in made or name not in inspect.signature(made[place]).parameters:
            continue
        node = OmegaConf.select(cfg, place)
        values: Any = OmegaConf.to_container(node, resolve=True)
        for option, needed in without_effect(made[place], values, [name]):
            raise UsageError(
                f"{key}={shown(values[option])}: has no effect without {place}.{needed}; add that, "
                f"or leave {key} out"
            )


def of_steps(cfg: DictConfig, words: Sequence[str]) -> list[str]:
    """Warnings about overrides that say how steps are made, where a strategy takes none."""
    return [
        f"warning: {key}={shown(OmegaConf.select(cfg, key))} has no effect, as this strategy "
        "learns every task without a step"
        for key in _keys(words)
        if key in ("optimizer", "schedule", "pack", *STEPS)
        or key.startswith(("optimizer.", "schedule."))
    ]


def _keys(words: Sequence[str]) -> list[str]:
    """The keys of overrides that give a value."""
    keys = [word.lstrip("+").partition("=")[0] for word in words if not word.startswith("~")]
    return list(dict.fromkeys(keys))
