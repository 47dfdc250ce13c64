"""One run from its parts: take a directory, learn the stream, leave tables and figures behind."""

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cl_bench.contracts import Strategy, Stream
from cl_bench.experiment.engine import LightningEngine, LoopSettings, TrainerFactory
from cl_bench.experiment.experiment import EvalSettings, Experiment
from cl_bench.experiment.observer import AlignmentObserver, AlignmentSettings
from cl_bench.learners import BaseLearner
from cl_bench.report import print_run, write_figures
from cl_bench.tracking import ProgressDisplay, Record, Sink

SinkFactory = Callable[[Path], Sink | None]


@dataclass(frozen=True)
class Identity:
    """What a run is called and how it came about; all of it goes into the record.

    Attributes:
        stream: its name in tables and in the run directory.
        strategy: the same, companions joined by ``+``.
        config: the resolved configuration, as YAML.
        command: the command that runs exactly this again.
    """

    stream: str
    strategy: str
    config: str = ""
    command: str = ""


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        directory: where its files are.
        matrix: R (T + 1, T), scores in [0, 1].
        summary: what ``summary.json`` holds: ``acc``, ``bwt``, ...
    """

    directory: Path
    matrix: np.ndarray
    summary: Mapping[str, Any]


def conduct(
    stream: Stream,
    strategy: Strategy,
    learner: BaseLearner,
    trainer: TrainerFactory,
    identity: Identity,
    *,
    loop: LoopSettings,
    evaluation: EvalSettings,
    alignment: AlignmentSettings,
    run_dir: Path | str | None = None,
    sinks: Sequence[SinkFactory] = (),
    environment: Mapping[str, Any] | None = None,
) -> Result:
    """Learn the stream and record everything.

    Args:
        stream: the tasks.
        strategy: which updates are allowed.
        learner: what learns.
        trainer: builds a ``lightning.Trainer`` from the callbacks of a task.
        identity: names, configuration, command.
        loop: seed, batches.
        evaluation: how much is evaluated.
        alignment: how updates are watched.
        run_dir: where to; None takes ``runs/<stream>/<strategy>/<time>-seed<k>``.
        sinks: each makes a logger for the run's directory, or None.
        environment: joins the record's ``environment.json``.

    Raises:
        UsageError: what the user can put right; results so far are kept.
    """
    facts = {"stream": identity.stream, "strategy": identity.strategy, "seed": loop.seed}
    directory = Path(run_dir) if run_dir is not None else _new_directory(identity, loop.seed)
    observer = AlignmentObserver(alignment, loop.batch_size, loop.seed)
    with (
        ProgressDisplay() as progress,
        Record.open(
            directory,
            [task.name for task in stream],
            task_id_known=stream.task_id_at_test,
            config=identity.config,
            command=identity.command,
            data=describe_data(stream),
            environment={"threads": torch.get_num_threads(), **(environment or {})},
            facts=facts,
            sinks=[sink for make in sinks if (sink := make(directory)) is not None],
        ) as record,
    ):
        progress.note(f"{identity.stream} · {identity.strategy} · seed {loop.seed}: {directory}")
        progress.start(record.task_names)
        engine = LightningEngine(
            learner,
            strategy,
            trainer,
            loop,
            observer if alignment.enabled else None,
            record,
            progress,
        )
        Experiment(stream, strategy, engine, evaluation, record, progress).run()
        summary = record.finish(optimizer_steps=engine.steps)
        progress.stop()
        record.figures(write_figures(directory))
        progress.note("")
        print_run(directory, progress.console)
        progress.note(f"\neverything about this run is in {directory}")
    return Result(directory, record.matrix, summary)


def describe_data(stream: Stream) -> dict[str, Any]:
    """The stream and the origin of every task, for ``data.json``."""
    return {
        "stream": stream.name,
        "scenario": stream.scenario,
        "modality": stream.modality,
        "fingerprint": stream.fingerprint,
        "tasks": [
            {
                "name": task.name,
                "classes": len(task.classes),
                "metric": task.metric,
                "source": task.origin.source,
                "licence": task.origin.licence,
                "citation": task.origin.citation,
            }
            for task in stream
        ],
    }


def _new_directory(identity: Identity, seed: int) -> Path:
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
