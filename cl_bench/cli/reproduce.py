"""``python -m cl_bench reproduce=<run directory>``: run it again from its record, and compare."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from cl_bench.cli.recorded import Recorded, named, read_recorded
from cl_bench.cli.trust import read_trust
from cl_bench.errors import UsageError, printable

FREE = ("run_dir", "checkpoint", "logger")
"""Settings that may differ: they change what is stored and who is told, never a result."""

REPORT = "reproduction.json"
"""In the new run's directory: what was compared, and what came out."""


def reproduce(arguments: Sequence[str]) -> bool:
    """Run again what ``reproduce=...`` names, in a new directory, and print how the two compare.

    Args:
        arguments: the command line; beside ``reproduce=`` only ``trust=...`` and settings in
            :data:`FREE`.

    Returns:
        Whether matrix, events, summary and weights are identical.

    Raises:
        UsageError: there is no finished run, or another setting is given.
    """
    trust, arguments = read_trust(arguments)
    directory, others = named(arguments, "reproduce")
    # torch and lightning load here, not for a listing.
    from cl_bench.cli.run import run_config
    from cl_bench.report.comparison import compare_runs, recorded_by_one
    from cl_bench.tracking.files import write_atomically
    from cl_bench.tracking.reading import is_finished

    run = read_recorded("reproduce", directory, trust)
    run.require_names("reproduce", "run that code again and compare the two directories")
    if not is_finished(directory):
        raise UsageError(
            f"reproduce={directory}: that run is not finished, so there is nothing to compare "
            f"with; python -m cl_bench resume={directory} finishes it"
        )
    run.cfg.run_dir = None
    # One run, one W&B run: who wants another says logger.mode=...
    run.cfg.logger = {"mode": "disabled"}
    _set(run.cfg, others)
    if run.cfg.run_dir is not None:
        run.cfg.run_dir = str(Path(run.cfg.run_dir).absolute())
    original = directory.absolute()
    print(f"reproducing {directory}: {run.command}")
    with run.surroundings():
        result = run_config(run.cfg, run.command, run.choices)
        again = result.directory.absolute()
    found = compare_runs(original, again)
    alone = recorded_by_one(original, again)
    changes = list(environment_changes(run, read_recorded("reproduce", again, trust)))
    report = {
        "original": str(original),
        "identical": not found,
        "differences": [vars(d) for d in found],
        "recorded_by_one": alone,
        "environment": changes,
    }
    write_atomically(again / REPORT, json.dumps(report, indent=2).encode())
    lines = [*_told(found, changes, directory, again)]
    if alone:
        lines.append(f"only one of them records: {', '.join(alone)}")
    print("\n" + printable("\n".join(lines)))
    return not found


def _told(
    found: Sequence[object], changes: Sequence[str], directory: Path, again: Path
) -> Iterator[str]:
    surroundings = "; ".join(changes) or "nothing"
    if not found:
        yield (
            f"identical: {again} has the matrix, events, summary and weights of {directory}, bit "
            "for bit (times left out)"
        )
        yield f"what differs around it: {surroundings}"
        return
    yield f"different: {again} is not the same as {directory}"
    for difference in found:
        yield f"  {difference}"
    yield f"what differs around it: {surroundings}"
    if not changes:
        yield "  the same environment gave another result: on a GPU, try deterministic=true"


def environment_changes(a: Recorded, b: Recorded) -> Iterator[str]:
    """What differs between the environments of two runs, in words.

    Directories do not count, nor do commits where nothing was changed in either.
    """
    for name, then, now in _unequal("", a.environment, b.environment):
        yield f"{name} {then} -> {now}"


IGNORED = ("directory", "reproducible", "cpu_count")


def _unequal(where: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for key in dict.fromkeys((*a, *b)):
        if not where and key in IGNORED:
            continue
        then, now = a.get(key), b.get(key)
        name = f"{where} {key}".strip()
        if isinstance(then, Mapping) and isinstance(now, Mapping):
            yield from _unequal("" if key == "packages" else name, then, now)
        elif then != now:
            yield name, str(then), str(now)


def _set(cfg: DictConfig, overrides: Sequence[str]) -> None:
    for text in overrides:
        key = text.lstrip("+").partition("=")[0]
        if key.partition(".")[0] not in FREE:
            raise UsageError(
                f"{text}: reproduce=... runs what was recorded; only {', '.join(FREE)} may differ, "
                "for other settings start a new run"
            )
        try:
            (override,) = OverridesParser.create().parse_overrides([text])
        except HydraException as error:
            raise UsageError(f"{text}: cannot be read ({error})") from None
        group = key.partition(".")[0]
        if key != "run_dir" and key.partition(".")[2] not in OmegaConf.select(cfg, group):
            known = ", ".join(f"{group}.{k}" for k in OmegaConf.select(cfg, group))
            raise UsageError(f"{text}: there is no such setting; there are {known}")
        OmegaConf.update(cfg, key, override.value())
