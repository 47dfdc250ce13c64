"""Whose code a run's record may have run: installed packages', ours, and what ``trust=`` names.

A record is data, and may be a stranger's. To import a module runs it, and to call what a
``_target_`` names runs that; so both are looked at first, for every ``_target_`` in a slot of the
configuration, wherever it is nested.
"""

import contextlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from cl_bench.errors import UsageError

OURS = ("cl_bench", "cl_bench.tasks")
"""Packages of ours; in a checkout the second is a link to a folder beside the first."""

FACTORIES = ("cl_bench.models", "cl_bench.learners", "cl_bench.strategies", "cl_bench.tasks")
"""Packages of ours whose functions make what slots take."""


@dataclass(frozen=True)
class Trust:
    """What the command line vouches for.

    Attributes:
        folders: with code of the user's; absolute, links resolved.
        targets: full names of classes and functions, whatever they are.
        everything: the configuration was composed from this very command line.
    """

    folders: tuple[Path, ...] = ()
    targets: tuple[str, ...] = ()
    everything: bool = False

    @contextlib.contextmanager
    def importable(self) -> Iterator[None]:
        """Inside, modules in the folders can be imported, and none in the working directory.

        A relative entry of ``sys.path`` stands for the directory that it named so far, wherever
        the working directory goes.
        """
        before = list(sys.path)
        here = [
            os.path.abspath(p) if not p or (not os.path.isabs(p) and os.path.isdir(p)) else p
            for p in before
        ]
        sys.path[:] = [*here, *(str(f) for f in self.folders if str(f) not in here)]
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.path[:] = before


def read_trust(arguments: Sequence[str]) -> tuple[Trust, list[str]]:
    """What ``trust=<folder or target>`` says, any number of times, and the other arguments.

    Raises:
        UsageError: there is no such folder.
    """
    folders, targets, others = [], [], []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key != "trust":
            others.append(argument)
        elif Path(value).is_dir():
            folders.append(Path(value).resolve())
        elif "." in value and all(part.isidentifier() for part in value.split(".")):
            targets.append(value)
        else:
            raise UsageError(
                f"trust={value}: there is no such folder; name one that holds your own code, or "
                "the full name of a class or function that the record may call"
            )
    return Trust(tuple(folders), tuple(targets)), others


def require_trusted(config: Mapping[str, Any], directory: Path, word: str, trust: Trust) -> None:
    """Raise :class:`UsageError` if a record names code that it may not have run.

    Every slot takes subclasses of its own kind, from installed packages or trusted folders, and
    functions of ours or from trusted folders whose return annotation names the kind.

    Args:
        config: plain, as recorded.
        directory: of the run.
        word: how it was named on the command line.
        trust: what the command line vouches for.
    """
    from cl_bench.cli.kinds import SLOTS

    if trust.everything:
        return
    with trust.importable():
        for slot, node in _slots(config):
            kind = SLOTS[slot.partition(".")[0].replace("also", "strategy")]
            if not isinstance(node, Mapping):
                raise UsageError(
                    f"{word}={directory}: {slot}={node} in its config.yaml is damaged: {kind.noun} "
                    "is a group of settings"
                )
            for key, name in _targets(node, slot):
                classes = kind.classes if key == slot else kind.parts
                try:
                    _require(key, name, classes, directory, trust)
                except UsageError as error:
                    raise UsageError(f"{word}={directory}: {error}") from None


def _slots(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    from cl_bench.cli.kinds import SLOTS

    for slot in SLOTS:
        if config.get(slot) is not None:
            yield slot, config[slot]
    companions = config.get("also") or {}
    if not isinstance(companions, Mapping):
        companions = {"": companions}
    for name, node in companions.items():
        yield f"also.{name}", node


def _targets(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield key, node["_target_"]
        for name, inner in node.items():
            yield from _targets(inner, f"{key}.{name}")
    elif isinstance(node, list):
        for i, inner in enumerate(node):
            yield from _targets(inner, f"{key}.{i}")


def _require(key: str, name: Any, classes: tuple[type, ...], directory: Path, trust: Trust) -> None:
    found = locate(f"{key}._target_", name, directory, trust)
    if name in trust.targets or _is_of(found, classes, trust):
        return
    own = isinstance(found, type) and _in_folders(found.__module__, trust)
    if own and "." in key.removeprefix("also."):
        return  # a part of the user's own, inside of something that takes it
    wanted = " or ".join(f"{c.__module__}.{c.__qualname__}" for c in classes)
    takes = f"a subclass of {wanted}" if classes else "no object"
    raise UsageError(
        f"{key}._target_={name} in its config.yaml: a record may name {takes} there, or a function "
        f"of your own that says it returns one; if you know what {name} does, add trust={name}"
    )


def _is_of(found: Any, classes: tuple[type, ...], trust: Trust) -> bool:
    from cl_bench.cli.kinds import returned

    if isinstance(found, type):
        return issubclass(found, classes)
    # Of others' functions an annotation says too little: torch has some that run what they read.
    if not inspect.isfunction(found):
        return False
    ours = any(f"{found.__module__}.".startswith(f"{package}.") for package in FACTORIES)
    made = returned(found)
    return bool(
        made
        and (ours or _in_folders(found.__module__, trust))
        and all(issubclass(m, classes) for m in made)
    )


def locate(key: str, name: Any, directory: Path, trust: Trust) -> Any:
    """The object that a record names, without running code that is not trusted.

    Args:
        key: where the name stands, for messages.
        name: dotted.
        directory: of the run, in which no code is looked for.
        trust: what the command line vouches for.

    Raises:
        UsageError: there is none, or its module lies elsewhere.
    """
    parts = name.split(".") if isinstance(name, str) else []
    plain = all(part.isidentifier() and not part.startswith("__") for part in parts)
    if len(parts) < 2 or not plain:
        raise UsageError(f"{key}={name!r} in its config.yaml is no name of a class or function")
    described = f"{key}={name} in its config.yaml"
    try:
        found = _imported(parts[0], described, directory, trust)
        for i, part in enumerate(parts[1:], 2):
            # Of modules and classes only: other objects may do anything when asked for a name.
            if not isinstance(found, ModuleType | type):
                raise AttributeError(f"{'.'.join(parts[: i - 1])} is no module")
            if isinstance(found, ModuleType) and not hasattr(found, part):
                found = _imported(".".join(parts[:i]), described, directory, trust)
            else:
                found = getattr(found, part)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # whatever a module raises when it is imported
        raise UsageError(
            f"{described}: cannot import it ({error}); install what is missing, or name the folder "
            "that holds it with trust=<folder>"
        ) from None
    return found


def _imported(module: str, described: str, directory: Path, trust: Trust) -> Any:
    """A module whose parent is imported already; refused, not run, if it lies elsewhere."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names:
        raise UsageError(f"{described}: that is Python's own, and makes nothing for a run")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise UsageError(
            f"{described}: there is no module {module}; install it, or name the folder that holds "
            "your own with trust=<folder>"
        )
    there = list(spec.submodule_search_locations or [])
    there += [spec.origin] if spec.has_location and spec.origin else []
    paths = [Path(place).resolve() for place in there]
    home = directory.resolve()
    beside = any(p.is_relative_to(home) for p in paths)
    named = any(folder.is_relative_to(home) for folder in trust.folders)
    if not paths or (beside and not named) or not all(_is_known(top, p, trust) for p in paths):
        place = paths[0] if paths else module
        folder = _root(paths[0], module) if paths else "<folder>"
        raise UsageError(
            f"{described} is code in {place}, which is neither installed nor vouched for: it has "
            f"not been run; if you know it, add trust={folder}"
        )
    return import_module(module)


def _root(path: Path, module: str) -> Path:
    """The folder on the import path that holds a module's file or folder."""
    return path.parents[module.count(".")]


def _is_known(top: str, path: Path, trust: Trust) -> bool:
    return _is_trusted(path, trust) or _is_installed(top, path)


def _is_trusted(path: Path, trust: Trust) -> bool:
    return any(path.is_relative_to(folder) for folder in trust.folders)


def _is_installed(top: str, path: Path) -> bool:
    if top == OURS[0]:
        homes = [Path(import_module(package).__path__[0]).resolve() for package in OURS]
        return any(map(path.is_relative_to, homes))
    sites = [Path(p) for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    return any(path.is_relative_to(site.resolve()) for site in sites)


def _in_folders(module: str, trust: Trust) -> bool:
    origin = getattr(sys.modules.get(module), "__file__", None)
    return origin is not None and _is_trusted(Path(origin).resolve(), trust)
