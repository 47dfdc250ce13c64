"""One run from its parts: take a directory, learn the stream, leave tables and figures behind."""

import itertools
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from cl_bench.contracts import Engine, Strategy, Stream
from cl_bench.ends import COMPLETED
from cl_bench.experiment.budget import PeakMemory, describe_budget
from cl_bench.experiment.checkpoint import Checkpoint, Checkpoints, CheckpointSettings
from cl_bench.experiment.checks import check_sharded, check_together
from cl_bench.experiment.determinism import describe_compute
from cl_bench.experiment.engine import LightningEngine
from cl_bench.experiment.experiment import EvalSettings, Experiment
from cl_bench.experiment.faults import memory_explained
from cl_bench.experiment.interrupts import Interrupts
from cl_bench.experiment.loop import LoopSettings
from cl_bench.experiment.observer import AlignmentSettings, Observer
from cl_bench.experiment.pretrain import Pretrained, pretrain
from cl_bench.experiment.probes import Observers, ProbeSettings, watch
from cl_bench.experiment.reopen import Resume, follow, reopen
from cl_bench.experiment.snapshot import RunState
from cl_bench.experiment.trainers import TrainerFactory
from cl_bench.learners import BaseLearner, DivergedError
from cl_bench.learners.guards import guards
from cl_bench.parallel.batch_norm import synchronise
from cl_bench.parallel.ranks import decided, rank, world
from cl_bench.report import print_run, write_figures, write_probe_figures
from cl_bench.tracking import ProgressDisplay, Record, Sink, open_record
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


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        directory: where its files are.
        matrix: R (T + 1, T), scores in [0, 1].
        summary: what ``summary.json`` holds: ``acc``, ``bwt``, ...
        learner: what has learned; ``learner.backbone`` is the network without its heads.
        strategy: with what it has remembered.
    """

    directory: Path
    matrix: np.ndarray
    summary: Mapping[str, Any]
    learner: BaseLearner = field(repr=False)
    strategy: Strategy = field(repr=False)


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
    probe: ProbeSettings | None = None,
    checkpoint: CheckpointSettings | None = None,
    run_dir: Path | str | None = None,
    resume: Resume = False,
    sinks: Sequence[SinkFactory] = (),
    environment: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    engine: Callable[..., Engine] = LightningEngine,
    notes: Sequence[str] = (),
    sharded: bool = False,
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
        probe: what else is measured on the way; None is nothing.
        checkpoint: when checkpoints are written; None takes the defaults.
        run_dir: where to; None takes ``runs/<stream>/<strategy>/<time>-seed<k>``.
        resume: go on with the run in ``run_dir`` from its newest checkpoint; ``"start"`` begins it
            again and moves what is there aside.
        sinks: each makes a logger for the run's directory, or None.
        environment: joins the record's ``environment.json``.
        facts: join stream, strategy and seed in the record's first event and summary.
        engine: builds what learns the tasks.
        notes: said where the run begins.
        sharded: whether processes share out the weights, too.

    Raises:
        UsageError: what the user can put right; results so far are kept.
    """
    if world() > 1:
        check_together(stream, learner)
        synchronise(learner)
    if sharded:
        check_sharded(strategy, probe)
        learner.shard()
    strategy.check(learner)
    guarding = guards(strategy, learner)
    named = {"stream": identity.stream, "strategy": identity.strategy, "seed": loop.seed}
    memory = PeakMemory()
    directory = Path(run_dir) if run_dir else decided(lambda: new_directory(identity, loop.seed))
    settings = checkpoint or CheckpointSettings()
    leads = rank() == 0
    scratch = None if leads else tempfile.TemporaryDirectory(prefix="cl_bench-")
    checkpoints = Checkpoints(directory, settings, writes=leads)
    progress = ProgressDisplay(None if leads else Console(quiet=True))
    title = f"{identity.stream} · {identity.strategy} · seed {loop.seed}: {directory}"
    begun: dict[str, Any] = {
        "task_names": [task.name for task in stream],
        "task_id_known": stream.task_id_at_test,
        "data": describe_data(stream),
        "facts": {**named, **(facts or {})},
        "sinks": [
            Patient(sink) for make in sinks if leads and (sink := make(directory)) is not None
        ],
    }
    last: Checkpoint | None = None
    if resume and leads:
        opened, last = reopen(directory, checkpoints, begun, resume, progress.note)
    else:
        opened = open_record(
            directory if scratch is None else scratch.name,
            **begun,
            config=identity.config,
            command=identity.command,
            choices=identity.choices,
            environment={**describe_compute(), **(environment or {})},
        )
    with (
        progress,
        opened as record,
        _saying_where(directory, checkpoints),
        memory_explained(loop, evaluation.batch_size),
        Interrupts(settings.enabled) as interrupts,
    ):
        for note in (title, *notes, *(guarding.lines() if guarding else ())):
            progress.note(note)
        if resume:
            last = follow(checkpoints, last)
            progress.note(_where_from(last, stream))
        if guarding and last is None:  # a resumed run has said so before
            record.guards(**guarding.facts())
        progress.start(record.task_names)
        observer = watch(
            stream,
            learner,
            record,
            alignment=alignment,
            probe=probe,
            evaluation=evaluation,
            loop=loop,
        )
        if stream.pretraining is not None:
            observed = observer or Observer()
            observed.before_pretraining(learner)
            came = pretrain(
                learner, stream.pretraining, trainer, loop.seed, progress, interrupts.stop
            )
            progress.note(_from_where(came))
            if last is None:  # a resumed run has said so before
                record.status("pretrained", **asdict(came))
            observed.after_pretraining(learner)
        state = RunState(
            learner, strategy, observer, record, checkpoints if settings.enabled else None
        )
        learning = engine(
            learner, strategy, trainer, loop, observer, record, progress, state, interrupts
        )
        begin = state.restore(last) if last else None
        Experiment(stream, strategy, learning, evaluation, record, progress).run(begin)
        probed = {"probe_seconds": observer.seconds} if isinstance(observer, Observers) else {}
        costs: dict[str, Any] = {**probed, **describe_budget(learner, strategy, stream)}
        summary = record.finish(
            optimizer_steps=state.optimizer_steps,
            checkpoint_bytes=state.largest,
            checkpoint_seconds=checkpoints.seconds,
            weights_bytes=checkpoints.weights.nbytes,
            **costs,
            **memory.read(),
            **learning.summary(),
        )
        progress.stop()
        if leads:
            _show(directory, record, learning, progress)
            try:
                interrupts.stop()  # one that came since the last task ends a sweep after this run
            except BaseException as stop:
                stop.add_note(COMPLETED)
                raise
    return Result(directory, record.matrix, summary, learner, strategy)


def _show(directory: Path, record: Record, learning: Engine, progress: ProgressDisplay) -> None:
    """Draw and print what the finished run came to."""
    pictures = (*write_figures(directory), *write_probe_figures(directory))
    record.figures([*pictures, *learning.figures(directory)])
    progress.note("")
    print_run(directory, progress.console)
    for remark in (*learning.remarks(), f"\neverything about this run is in {directory}"):
        progress.note(remark)


def _from_where(came: Pretrained) -> str:
    source = "from the cache" if came.from_cache else f"{came.seconds:.0f} s"
    return f"pre-trained for {came.steps} steps ({source})"


@contextmanager
def _saying_where(directory: Path, checkpoints: Checkpoints) -> Iterator[None]:
    """Whatever ends the run early tells where its files are, and how to go on."""
    try:
        yield
    except BaseException as error:
        if COMPLETED in getattr(error, "__notes__", ()):
            raise
        error.add_note(f"results so far are in {directory}")
        if checkpoints.paths() and not isinstance(error, DivergedError):
            error.add_note(f"go on with: python -m cl_bench resume={shlex.quote(str(directory))}")
        raise


def _where_from(found: Checkpoint | None, stream: Stream) -> str:
    if found is None:
        return "the run begins again from its beginning"
    task, step = found.state["task"], found.state["step"]
    if task == len(stream):
        return f"resumed from {found.path.name}: all tasks are learned"
    where = f"task {task + 1}/{len(stream)} {stream[task].name}"
    return f"resumed from {found.path.name}: {where}" + (f", step {step:,}" if step else "")


def describe_data(stream: Stream) -> dict[str, Any]:
    """The stream and the origin of every task, for ``data.json``."""
    return {
        "stream": stream.name,
        "scenario": stream.scenario,
        "modality": stream.modality,
        "input_shape": list(stream.input_shape),
        "fingerprint": stream.fingerprint,
        "tasks": [
            {
                "name": task.name,
                "classes": len(task.classes),
                "first_class": task.classes.start,
                "head": task.head,
                "metric": task.metric,
                "source": task.origin.source,
                "licence": task.origin.licence,
                "citation": task.origin.citation,
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
