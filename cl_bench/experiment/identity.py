"""What a run is called, where it is written, and what its record begins with."""

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cl_bench.contracts import Strategy, Stream
from cl_bench.experiment.determinism import describe_compute
from cl_bench.parallel.ranks import rank
from cl_bench.tracking import Record, Sink, open_record
from cl_bench.tracking.patience import Patient

SinkFactory = Callable[[Path], Sink | None]


@dataclass(frozen=True)
class Identity:
    """What a run is called and how it came about; all of it goes into the record.

    Attributes:
        stream: its name in tables and in the run directory.
        strategy: the same, companions joined by ``+``.
        config: the resolved configuration, as YAML.
        command: the command that runs exactly this again.
        choices: which option of each configuration group was chosen.
    """

    stream: str
    strategy: str
    config: str = ""
    command: str = ""
    choices: Mapping[str, Any] = field(default_factory=dict)


def beginning(
    stream: Stream,
    strategy: Strategy,
    identity: Identity,
    seed: int,
    facts: Mapping[str, Any] | None,
    directory: Path,
    sinks: Sequence[SinkFactory],
) -> dict[str, Any]:
    """What a record is opened with, whether the run is new or goes on."""
    named = {"stream": identity.stream, "strategy": identity.strategy, "seed": seed}
    bound = {} if strategy.bound is None else {"bound": strategy.bound}
    makers = sinks if rank() == 0 else ()
    return {
        "task_names": [task.name for task in stream if task.kind == "learn"],
        "task_id_known": stream.task_id_at_test,
        "data": describe_data(stream),
        "facts": {**named, **bound, **(facts or {})},
        "sinks": [Patient(sink) for make in makers if (sink := make(directory)) is not None],
    }


def opened_anew(
    workplace: Path,
    begun: Mapping[str, Any],
    identity: Identity,
    environment: Mapping[str, Any] | None,
) -> Record:
    """The record of a new run."""
    return open_record(
        workplace,
        **begun,
        config=identity.config,
        command=identity.command,
        choices=identity.choices,
        environment={**describe_compute(), **(environment or {})},
    )


def describe_data(stream: Stream) -> dict[str, Any]:
    """The stream and the origin of every task, for ``data.json``."""
    return {
        "stream": stream.name,
        "scenario": stream.scenario,
        "modality": stream.modality,
        "input_shape": list(stream.input_shape),
        "fingerprint": stream.fingerprint,
        **({"facts": dict(stream.facts)} if stream.facts else {}),
        "tasks": [
            {
                "name": task.name,
                "classes": len(task.classes),
                "first_class": task.classes.start,
                "head": task.head,
                "metric": task.metric,
                "test_samples": len(task.scored),
                "source": task.origin.source,
                "licence": task.origin.licence,
                "citation": task.origin.citation,
                **({"kind": task.kind} if task.kind != "learn" else {}),
                **({"facts": dict(task.facts)} if task.facts else {}),
            }
            for task in stream
        ],
    }


def new_directory(identity: Identity, seed: int) -> Path:
    """A directory that nobody else has: of runs that start together, each gets its own."""
    parent = Path("runs") / _plain(identity.stream) / _plain(identity.strategy)
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-seed{seed}"
    for attempt in itertools.count(1):
        directory = parent / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:
            return directory  # the record says what is wrong with it, and what to do
        return directory
    raise AssertionError("unreachable")


def _plain(name: str) -> str:
    return name.replace(os.sep, "-").replace("=", "-").replace(",", "-")
