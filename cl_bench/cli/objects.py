"""Any object from the node of a configuration that names it, with errors that name the key."""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any, get_args

from hydra.errors import HydraException
from hydra.utils import get_object, instantiate
from lightning import Trainer
from omegaconf import DictConfig, OmegaConf

from cl_bench.cli.foreign import REFUSED, ranges_of
from cl_bench.cli.kinds import require_kind, require_made
from cl_bench.contracts import UsageError
from cl_bench.contracts.checking import annotations, check
from cl_bench.contracts.options import known, shown

HYDRAS = ("_target_", "_partial_", "_convert_", "_recursive_")
"""Keys of a node that are for Hydra, not for the target."""


def build(cfg: DictConfig, **given: Any) -> Any:
    """Make what ``_target_`` names from its configuration and from objects that are at hand.

    Args:
        cfg: a node with ``_target_``.
        given: objects; those that the target does not ask for are left out.

    Raises:
        UsageError: the target does not exist, or refuses its arguments.
    """
    with explained(cfg):
        target = target_of(cfg)
        options = checked_options(target, cfg)
        accepted = inspect.signature(target).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        objects = {k: v for k, v in given.items() if takes_all or k in accepted}
        refuse_given(cfg, objects)
        # Through _partial_, since Hydra would make a configuration of the objects.
        make = instantiate(cfg, _partial_=True, _convert_="all")
        made = make(**{**options, **objects})
        require_made(made, cfg)
        return made


def refuse_given(cfg: DictConfig, names: Iterable[str]) -> None:
    """Raise :class:`UsageError` if the configuration has an argument that the run itself gives."""
    for name in names:
        if cfg.get(name) is not None:
            key = cfg._get_full_key(name)
            raise UsageError(f"{key}={shown(plain(cfg)[name])}: the run gives it; leave it out")


@contextmanager
def as_values() -> Iterator[None]:
    """Torch raises a ``RuntimeError`` for some settings of an optimizer or a schedule."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def target_of(cfg: DictConfig) -> Callable[..., Any]:
    """What ``_target_`` names, which is of the slot's kind."""
    target: Callable[..., Any] = get_object(cfg._target_)
    require_kind(target, cfg)
    return target


def checked_options(target: Callable[..., Any], cfg: DictConfig) -> dict[str, Any]:
    """The plain options of a node, as the target takes them.

    Raises:
        UsageError: an option is not one of the target's, or not what its annotation asks for.
    """
    require_arguments(target, cfg)
    prefix = f"{cfg._get_full_key(None)}."
    hints = annotations(target)
    options = {}
    for key, value in plain(cfg).items():
        if key in HYDRAS or _has_target(value):
            continue
        kinds = [k for k in get_args(hints.get(key)) if inspect.isclass(k) and is_dataclass(k)]
        if value is None and kinds:
            fields = ", ".join(inspect.signature(kinds[0]).parameters)
            raise UsageError(f"{prefix}{key}=null: leave it out, or set its options ({fields})")
        options[key] = value
    return check(target, options, prefix, ranges_of(target))


def _has_target(value: Any) -> bool:
    """Whether Hydra makes an object of the value, or of something in it."""
    if isinstance(value, dict):
        return "_target_" in value or any(map(_has_target, value.values()))
    return isinstance(value, list) and any(map(_has_target, value))


def plain(cfg: DictConfig, resolve: bool = True) -> dict[str, Any]:
    """The node as a dictionary."""
    plain: Any = OmegaConf.to_container(cfg, resolve=resolve)
    return {str(k): v for k, v in plain.items()}


def require_arguments(target: Callable[..., Any], cfg: DictConfig) -> None:
    """Raise :class:`UsageError` if a key of ``cfg`` is none of the target's arguments."""
    accepted = inspect.signature(target).parameters
    if any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        return
    users = [name for name in accepted if not (target is Trainer and name in REFUSED)]
    for key in cfg:
        if str(key) in accepted or str(key) in HYDRAS:
            continue
        name = cfg._get_full_key(str(key))
        hint = known(str(key), users, f"{name.rpartition('.')[0]}.")
        raise UsageError(
            f"{name}={shown(plain(cfg, resolve=False)[str(key)])}: {target.__qualname__} has no "
            f"such argument.{hint}\nIt takes: {', '.join(users)}"
        )


@contextmanager
def explained(cfg: DictConfig) -> Iterator[None]:
    """Turn what a constructor raises into one message that names the target."""
    try:
        yield
    except (TypeError, ValueError, ImportError, HydraException) as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UsageError):
                raise UsageError(_with_full_keys(str(cause), cfg)) from None
            cause = cause.__cause__
        given = {str(k): v for k, v in cfg.items() if not str(k).startswith("_") and v is not None}
        named = {k: v for k, v in given.items() if f"{v}" in str(error)} or given
        settings = ", ".join(f"{cfg._get_full_key(k)}={shown(v)}" for k, v in named.items())
        refusing = cfg.get("_target_", cfg._get_full_key(None))
        remedy = _defaults(cfg, named)
        raise UsageError(f"{settings}: {refusing} does not take that ({error}){remedy}") from error


def _defaults(cfg: DictConfig, keys: Iterable[str]) -> str:
    """What the target takes if nobody says anything, as a hint."""
    try:
        parameters = inspect.signature(get_object(cfg._target_)).parameters
    except (AttributeError, ValueError, ImportError, HydraException):
        return ""
    found = [parameters[k] for k in keys if k in parameters]
    known = [f"{p.name}={p.default}" for p in found if p.default is not p.empty]
    return f"; by default {', '.join(known)}" if known else ""


def _with_full_keys(message: str, cfg: DictConfig) -> str:
    """A constructor knows its arguments' names, not where they stand in the configuration."""
    node = cfg._get_full_key(None)
    if node.startswith("also."):  # a strategy calls its settings strategy.<key>
        message = message.replace("strategy.", f"{node}.")
    key = re.match(r"\w+(?=[.=])", message)
    return f"{node}.{message}" if key and key[0] in cfg and node else message
