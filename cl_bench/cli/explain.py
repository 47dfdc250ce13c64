"""What Hydra says about a command line, in the words of somebody who typed it."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cl_bench.cli.listing import options
from cl_bench.errors import UsageError

ADDED = ("strategy", "stream", "protocol", "experiment", "also", "federation", "backbone", "engine")
"""Groups without a default: ``+`` names their first choice."""

REPLACED = {"widths": "model.hidden"}
"""Settings of earlier versions, and what says the same now."""


def explain(error: Exception, overrides: Sequence[str], directories: Sequence[Path]) -> str:
    """One message with the value and the remedy.

    Args:
        error: what Hydra or OmegaConf raised while it composed the configuration.
        overrides: the command line.
        directories: folders with configs, the ones that count most first.

    Returns:
        The message, ours where we know the case, else the original one.
    """
    message = str(error).strip()
    if match := re.search(r"An item is already at '([^']+)'", message):
        return (
            f"{_typed(match[1], overrides)}: {match[1]} has a value already; change it without "
            f"the plus, {match[1]}=..."
        )
    if match := re.match(r"Could not (?:override|append to config|delete).*? '([^']+)'", message):
        return _wrong_key(match[1], overrides, directories)
    if re.match(r"Key '[^']+' is not in struct|Missing key ", message):
        taken = getattr(error, "full_key", None) or re.split(r"['\s]", message)[1]
        return f"{taken} is missing: a run needs it; leave ~{taken} out"
    if match := re.match(r"(?:In .*: )?Could not (?:find|load) '([^/']+)/([^']+)'", message):
        group, name = match[1], match[2]
        if group == "hydra":
            kind, _, plugin = name.partition("/")
            return (
                f"hydra/{kind}={plugin}: no such {kind} is installed; install the plugin that "
                "brings it (docs/studies.md), or name another"
            )
        return _no_such_option(group, name, options(directories, group))
    if match := re.match(r"Multiple values for (\w+)\.|(\w+) appears more than once", message):
        group = match[1] or match[2]
        if group == "also":
            return f"+also=... stands there twice: {_typed(group, overrides)}; use +also=[er,ewc]"
        return (
            f"{_typed(group, overrides)}: {group} has a value already; change it without the "
            f"plus, {group}=..."
        )
    if match := re.match(r"Error merging override (.+)", message):
        key = match[1].lstrip("+").partition("=")[0]
        return (
            f"{match[1]}: {key} holds options of its own; set them one by one, {key}.<option>=..."
        )
    if match := re.match(r"Ambiguous value for argument '(.+)'", message):
        key, _, values = match[1].partition("=")
        return (
            f"{match[1]}: a comma stands between values; write {key}=[{values}] for a list, a "
            "point in a decimal number, or run one job a value with -m"
        )
    if "INTERVAL_SWEEP" in message:
        wrong = next(o for p in _parsed(overrides) if p.is_interval_sweep() and (o := p.input_line))
        return f"{wrong}: an interval is for a search, -m +search=...; name values, a,b,c"
    if isinstance(error, OverrideParseException):
        wrong = next((o for o in overrides if not _parsed([o])), error.override)
        if any(c.isdecimal() and not c.isascii() for c in wrong):
            return f"{wrong}: cannot be read; write numbers with the digits 0 to 9"
        return (
            f"{wrong}: cannot be read ({message.splitlines()[0]}); an override is key=value, with "
            f"quotes around special characters: 'key=\"value\"'"
        )
    return message


def refuse_lists(overrides: Sequence[str]) -> str | None:
    """Hydra would merge the configs of ``+strategy=[gpm,er]`` into one; say what to do instead.

    Args:
        overrides: of one job.

    Returns:
        The message, or None where every group but ``also`` has one choice.
    """
    for override in _parsed(overrides):
        key, value = override.key_or_group, override.value()
        if key == "also" and isinstance(value, list) and len(set(map(str, value))) < len(value):
            return f"+also={_joined(list(map(str, value)))}: name each companion once"
        if key in (
            "strategy",
            "stream",
            "model",
            "optimizer",
            "learner",
            "trainer",
            "federation",
            "engine",
            "backbone",
            "schedule",
            "protocol",
            "experiment",
            "search",
            "cluster",
        ) and (isinstance(value, list)):
            names = [str(v) for v in value]
            if key != "strategy":
                return f"{key}=[{','.join(names)}]: choose one; -m {key}={','.join(names)} runs all"
            return (
                f"+strategy=[{','.join(names)}]: a run has one strategy; name it and add the "
                f"others as companions: +strategy={names[0]} +also={_joined(names[1:])}"
            )
    return None


def refuse_empty(words: Sequence[str], groups: Path) -> None:
    """Raise :class:`UsageError` for a group without a choice, and for a sweep over no values.

    Args:
        words: the command line.
        groups: the folder whose folders are the groups.
    """
    for override in (o for word in words for o in _parsed([word])):
        key, sweeps = override.key_or_group, override.is_sweep_override()
        if not key:
            raise UsageError(f"{override.input_line}: names no setting; an override is key=value")
        if override.is_interval_sweep():
            continue  # a search draws from it; without one Hydra refuses it
        try:
            idle = sweeps and not any(True for _ in override.sweep_iterator())
        except ValueError as error:  # range(0,3,0)
            raise UsageError(f"{override.input_line}: no sweep ({error})") from None
        if idle:
            raise UsageError(f"{override.input_line}: holds no value; name at least one")
        if (key, override.value()) == ("hydra.launcher.n_jobs", 0):
            raise UsageError(
                f"{override.input_line}: that many jobs at a time; at least 1, or -1 for all cores"
            )
        hydras = key.startswith("hydra")
        if not (sweeps or hydras) and override.value() == {} and not override.is_delete():
            raise UsageError(
                f"{override.input_line}: merges nothing into what is there; leave it out"
            )
        choices = (str, list, dict)
        group = "." not in key and (groups / key).is_dir() and not override.is_delete()
        value = None if sweeps else override.value()
        if group and not sweeps and (value == "" or not isinstance(value, choices)):
            names = ", ".join(sorted(options([groups], key)))
            raise UsageError(f"{override.input_line}: choose one of {names}, or leave it out")


def searched(overrides: Sequence[str]) -> list[str]:
    """Folders that ``hydra.searchpath=[file://...]`` adds."""
    for override in _parsed(
        [o for o in overrides if o.lstrip("+").startswith("hydra.searchpath=")]
    ):
        value = override.value()
        if isinstance(value, list):
            return [str(v).removeprefix("file://") for v in value if "pkg://" not in str(v)]
    return []


def _wrong_key(key: str, overrides: Sequence[str], directories: Sequence[Path]) -> str:
    """For a key that does not exist: those that do, the likeliest first."""
    typed = _typed(key, overrides)
    if key in ADDED:
        value = typed.partition("=")[2]
        return f"{typed}: {key} has no default to replace; add it with a plus, +{key}={value}"
    if key in REPLACED:
        return f"{typed}: this setting is now {REPLACED[key]}; write {REPLACED[key]}=..."
    parent, _, wrong = key.rpartition(".")
    settings = _settings([o for o in overrides if o != typed], directories)
    while "." in parent and not any(s.startswith(f"{parent}.") for s in settings):
        parent, _, wrong = parent.rpartition(".")  # probe.recovry.enabled
    prefix = f"{parent}." if parent else ""
    inside = [s.removeprefix(prefix) for s in settings if s.startswith(prefix)]
    known = list(dict.fromkeys(s.partition(".")[0] for s in inside))
    if not known:
        group = key.partition(".")[0]
        if group in ADDED and _typed(group, overrides) == group:
            return f"{typed}: no {group} is named; add one, +{group}=..."
        return f"{typed}: there is no such setting; --cfg job in place of it shows all there are"
    hint = _did_you_mean(wrong, known, prefix) or _elsewhere(wrong, settings)
    return f"{typed}: there is no such setting.{hint}\n{_owner(parent)} has: {', '.join(known)}"


def _no_such_option(group: str, name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    sign = "+" if group in ADDED else ""
    if not names:
        return f"{sign}{group}={name}: there is no group {group!r}"
    noun = "companion" if group == "also" else group
    hint = _did_you_mean(name, names, f"{sign}{group}=")
    return f"{sign}{group}={name}: there is no such {noun}.{hint}\nThere are: {', '.join(names)}"


def _did_you_mean(wrong: str, known: Iterable[str], prefix: str) -> str:
    close = difflib.get_close_matches(wrong, list(known), n=1)
    return f" Did you mean {prefix}{close[0]}?" if close else ""


def _elsewhere(wrong: str, settings: Sequence[str]) -> str:
    """Settings of that name, or with that word in it, that live in another place."""
    leaves = [(s, s.rpartition(".")[2]) for s in settings]
    meant = [s for s, leaf in leaves if leaf == wrong] or [
        s for s, leaf in leaves if wrong in leaf.split("_")
    ]
    return f" Did you mean {' or '.join(meant[:3])}?" if meant else ""


def _owner(parent: str) -> str:
    return parent or "the configuration"


def _joined(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"[{','.join(names)}]"


def _typed(key: str, overrides: Sequence[str]) -> str:
    """What the user wrote for ``key``."""
    written = [o for o in overrides if o.lstrip("+~").partition("=")[0].partition("@")[0] == key]
    return " ".join(written) or key


def _settings(overrides: Sequence[str], directories: Sequence[Path]) -> list[str]:
    """Dotted names of all settings, once the choices on the command line are applied."""
    *others, ours = directories
    choices = []
    for override in _parsed(overrides):
        # Wrong keys elsewhere on the command line must not spoil the answer about this one.
        if "." in override.key_or_group:
            continue
        value = override.get_value_element_as_str()
        if override.is_sweep_override():
            value = next(iter(override.sweep_string_iterator()))
        choices.append(f"{override.get_key_element()}={value}")
    choices.append(f"hydra.searchpath=[{','.join(f'file://{d}' for d in others)}]")
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(ours), version_base="1.3"):
            composed = hydra.compose("config", choices)
    except (HydraException, OmegaConfBaseException):
        return []
    return list(_flat(OmegaConf.to_container(composed), ""))


def _flat(node: Any, name: str) -> Iterator[str]:
    for key, value in node.items():
        if str(key).startswith("_"):
            continue
        yield f"{name}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name}{key}.")


def _parsed(overrides: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException:
        return []
