"""Running cells, and taking runs in: ours and other people's by one door."""

import datetime
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cl_bench.board.cells import Cell, Record, record_of, write_cell
from cl_bench.board.protocol import Method, Protocol
from cl_bench.contracts import UsageError
from cl_bench.places import conf_directory
from cl_bench.report.study import INCIDENTAL, PACKING
from cl_bench.report.trials import Trial, find_runs, flat, read_trial
from cl_bench.tracking.files import RESULTS, read_json, read_text
from cl_bench.tracking.renamed import without_idle

PROGRAM = (sys.executable, "-m", "cl_bench")
SHOWN = "python -m cl_bench"


def run_cell(
    protocol: Protocol, method: Method, runs: Path, results: Path, data: str | None, seconds: float
) -> Cell | None:
    """Run what is missing of a cell, and keep it.

    Args:
        protocol: and
        method: say which.
        runs: folder of the runs; what is finished there is not run again.
        results: folder of all cells.
        data: folder of data sets.
        seconds: after which it is stopped, to go on another time.

    Returns:
        The cell; None where the time was up.

    Raises:
        UsageError: a run failed, or is not what the protocol says.
    """
    place = runs / protocol.name / method.name
    chosen: Mapping[str, Any] = {}
    trials: list[Trial] = []
    if method.choose:
        left = _sweep(protocol.search(method, data), place / "trials", seconds)
        if left is None:
            return None
        seconds = left
        trials = _read(place / "trials")
        chosen = best_trial(method, trials)
    if _sweep(protocol.sweep(method, chosen, data), place / "runs", seconds) is None:
        return None
    return take_in(protocol, method, chosen, _read(place / "runs"), trials, results)


def best_trial(method: Method, trials: Sequence[Trial]) -> Mapping[str, Any]:
    """What was best on validation data; of equal ones the first that is declared.

    Raises:
        UsageError: a trial is missing.
    """
    scores = []
    for settings in method.trials():
        found = [t for t in trials if _has(t, settings)]
        if not found:
            raise UsageError(f"{method.name}: the trial {dict(settings)} is missing")
        acc = found[-1].summary.get("acc")
        scores.append(-1.0 if acc is None else float(acc))
    return method.trials()[scores.index(max(scores))]


def _has(trial: Trial, settings: Mapping[str, Any]) -> bool:
    return all(trial.settings.get(key) == value for key, value in settings.items())


def take_in(
    protocol: Protocol,
    method: Method,
    chosen: Mapping[str, Any],
    runs: Sequence[Trial],
    trials: Sequence[Trial],
    results: Path,
) -> Cell:
    """Keep runs as a cell, once each is what the protocol declares and all of them are there.

    Args:
        protocol: that they follow.
        method: that they are of.
        chosen: settings that the trials led to.
        runs: every seed and order once.
        trials: runs among which was chosen.
        results: folder of all cells.

    Raises:
        UsageError: one is missing, doubled, not completed or another run than declared.
    """
    by_pair: dict[tuple[int, int | None], Trial] = {}
    for trial in runs:
        pair = (trial.seed, _order(protocol, trial))
        if pair in by_pair:
            raise UsageError(f"{trial.run.directory}: seed and order {pair} are there twice")
        by_pair[pair] = trial
    orders = protocol.orders.values or (None,)
    wanted = [(seed, order) for order in orders for seed in protocol.seeds]
    missing = [pair for pair in wanted if pair not in by_pair]
    if missing:
        raise UsageError(f"{protocol.name}/{method.name}: seed and order {missing[0]} are missing")
    for trial in by_pair.values():
        require_declared(protocol, method, chosen, trial)
    searched = [_trial(protocol, method, s, trials) for s in method.trials() if trials]
    contents: dict[str, bytes] = {}

    def kept(trial: Trial, name: str, settings: Mapping[str, Any]) -> Record:
        file = f"{method.name}/{name}.jsonl.gz"
        contents[file] = read_text(trial.run.directory / RESULTS).encode()
        return record_of(trial, _order(protocol, trial), file, settings)

    records = [
        kept(by_pair[pair], "-".join(["seed", *(str(n) for n in pair if n is not None)]), {})
        for pair in wanted
    ]
    tried = [
        kept(trial, f"trial{k}", settings)
        for k, (trial, settings) in enumerate(zip(searched, method.trials(), strict=False), start=1)
    ]
    settings = {**method.settings, **chosen}
    cell = Cell(
        protocol=protocol.name,
        method=method.name,
        command=f"{SHOWN} -m {shlex.join(protocol.sweep(method, chosen, '/path/to/data'))}",
        date=max(trial.run.started for trial in by_pair.values())[:10],
        machine="; ".join(dict.fromkeys(_machine(by_pair[pair]) for pair in wanted)),
        task_id_known=by_pair[wanted[0]].run.task_id_known,
        settings=settings,
        runs=records,
        trials=tried,
        reference=reference(declared_settings(protocol, method, chosen, wanted[0][0])),
    )
    write_cell(results, cell, contents)
    return cell


def require_declared(
    protocol: Protocol, method: Method, chosen: Mapping[str, Any], trial: Trial
) -> None:
    """Raise :class:`UsageError` where a run's settings are not those of its cell."""
    where = trial.run.directory
    if trial.run.status != "completed":
        raise UsageError(f"{where}: {trial.run.status}, and only completed runs make a cell")
    _require_settings(protocol, method, chosen, trial)
    if trial.run.facts.get("search"):
        raise UsageError(f"{where}: it is a trial of a search and has seen no test data")


def _trial(
    protocol: Protocol, method: Method, settings: Mapping[str, Any], trials: Sequence[Trial]
) -> Trial:
    """The trial with those settings that :func:`best_trial` read, if it ran as is declared."""
    found = [t for t in trials if _has(t, settings)][-1]
    _require_settings(protocol, method, settings, found)
    ran = (found.seed, _order(protocol, found))
    wanted = (protocol.seeds[0], protocol.orders.chosen_on)
    if ran != wanted:
        where = found.run.directory
        raise UsageError(f"{where}: a trial of {ran}, and {protocol.name} chooses with {wanted}")
    return found


def _require_settings(
    protocol: Protocol, method: Method, chosen: Mapping[str, Any], trial: Trial
) -> None:
    where = trial.run.directory
    own = {"seed", protocol.orders.setting, *PACKING}
    wanted = declared_settings(protocol, method, chosen, trial.seed)
    for key, value in trial.settings.items():
        if key in own or key.partition(".")[0] in INCIDENTAL:
            continue
        if key not in wanted or not _same(wanted[key], value):
            said = repr(wanted[key]) if key in wanted else "not to be there"
            raise UsageError(
                f"{where}: {key} is {value!r}, and {protocol.name}/{method.name} declares {said}"
            )


def reference(declared: Mapping[str, Any]) -> dict[str, Any] | None:
    """The published numbers that a cell's settings name, as declared: a run may name anyone's."""
    found = {k.partition(".")[2]: v for k, v in declared.items() if k.startswith("reference.")}
    return found or None


def _same(a: Any, b: Any) -> bool:
    return bool(a == b)


def declared_settings(
    protocol: Protocol, method: Method, chosen: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """Every setting of a run with that seed by its dotted name, as Hydra composes it.

    Others may follow from the seed.
    """
    words = [*protocol.words(method, chosen, "/path/to/data"), f"seed={seed}"]
    try:
        with hydra.initialize_config_dir(str(conf_directory()), version_base="1.3"):
            config = OmegaConf.to_container(hydra.compose("config", words), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        said = str(error).splitlines()[0]
        raise UsageError(f"{protocol.name}/{method.name}: {said}") from None
    assert isinstance(config, dict)
    return dict(flat(without_idle({str(key): value for key, value in config.items()})))


def _order(protocol: Protocol, trial: Trial) -> int | None:
    value = trial.settings.get(protocol.orders.setting) if protocol.orders.setting else None
    return None if value is None else int(value)


def _read(folder: Path) -> list[Trial]:
    return [read_trial(directory, []) for directory in find_runs([folder])]


def _sweep(words: Sequence[str], place: Path, seconds: float) -> float | None:
    """Run the jobs of a sweep that are not done; the seconds left, None where they were up.

    Raises:
        UsageError: a job failed.
    """
    place.mkdir(parents=True, exist_ok=True)
    begun = datetime.datetime.now()
    process = subprocess.Popen(
        [*PROGRAM, "-m", *words, "logger.mode=disabled", f"sweep_dir={place}"],
        stdout=subprocess.DEVNULL,
    )
    try:
        status = process.wait(max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        process.wait()
        return None
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    if status:
        raise UsageError(f"{place}: the sweep ended with {status}; {SHOWN} -m {shlex.join(words)}")
    return seconds - (datetime.datetime.now() - begun).total_seconds()


def _machine(trial: Trial) -> str:
    """What a run ran on, as its record has it: whoever takes it in may sit at another one."""
    told = read_json(trial.run.directory / "environment.json") or {}
    known = [str(told[key]) for key in ("platform", "cpu") if told.get(key)]
    return ", ".join([*known, f"Python {told.get('python', 'not known')}"])
