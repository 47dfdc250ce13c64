"""One run from its parts: take a directory, learn the stream, leave tables and figures behind."""

import functools
import itertools
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from cl_bench.contracts import Engine, Strategy, Stream
from cl_bench.contracts.strategy import penalises_weights
from cl_bench.ends import COMPLETED
from cl_bench.experiment.budget import PeakMemory, describe_budget
from cl_bench.experiment.checkpoint import Checkpoint, Checkpoints, CheckpointSettings
from cl_bench.experiment.disk import disk
from cl_bench.experiment.engine import LightningEngine
from cl_bench.experiment.experiment import EvalSettings, Experiment
from cl_bench.experiment.faults import memory_explained
from cl_bench.experiment.identity import (
    Identity,
    SinkFactory,
    beginning,
    new_directory,
    opened_anew,
)
from cl_bench.experiment.interrupts import Interrupts
from cl_bench.experiment.loop import LoopSettings
from cl_bench.experiment.observer import AlignmentSettings, Observer
from cl_bench.experiment.pretrain import Pretrained, pretrain
from cl_bench.experiment.probes import Observers, ProbeSettings, watch
from cl_bench.experiment.reopen import Resume, follow, reopen
from cl_bench.experiment.resuming import ASK_EVERY
from cl_bench.experiment.snapshot import RunState
from cl_bench.experiment.trainer_checks import check_sharded, check_together
from cl_bench.experiment.trainers import TrainerFactory, quiet_lightning
from cl_bench.learners import BaseLearner, DivergedError
from cl_bench.learners.guards import HALVING, Guards, guards
from cl_bench.learners.observed import answers
from cl_bench.parallel.batch_norm import synchronise
from cl_bench.parallel.ranks import decided, rank, world
from cl_bench.parallel.stored import require_files
from cl_bench.report import print_run, write_figures, write_probe_figures
from cl_bench.tracking import ProgressDisplay, Record

HALF = {"bf16-mixed": torch.bfloat16}
"""What layers compute in by the Trainer's precision, where no gradient is scaled for it."""


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


@dataclass(frozen=True)
class _Parts:
    """What learns what, and how it is watched; :func:`conduct` says what each is."""

    stream: Stream
    strategy: Strategy
    learner: BaseLearner
    trainer: TrainerFactory
    loop: LoopSettings
    evaluation: EvalSettings
    alignment: AlignmentSettings
    probe: ProbeSettings | None


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
    parts = _Parts(stream, strategy, learner, trainer, loop, evaluation, alignment, probe)
    guarding = _checked(parts, sharded)
    memory = PeakMemory()
    directory = Path(run_dir) if run_dir else decided(lambda: new_directory(identity, loop.seed))
    kept = checkpoint or CheckpointSettings()
    checkpoints = Checkpoints(directory, kept, writes=rank() == 0, apart=sharded)
    if sharded and kept.enabled:
        require_files()
    room = disk(learner, learner._optimizer_factory, checkpoints.settings, len(stream), directory)
    if not resume:
        room.require_room()
    progress = ProgressDisplay(None if rank() == 0 else Console(quiet=True))
    begun = beginning(stream, strategy, identity, loop.seed, facts, directory, sinks)
    with _workplace(directory) as workplace:
        if resume and rank() == 0:
            opened, last = reopen(directory, checkpoints, begun, resume, progress.note)
        else:
            opened, last = opened_anew(workplace, begun, identity, environment), None
        with (
            progress,
            opened as record,
            _saying_where(directory, checkpoints),
            memory_explained(loop, evaluation.batch_size),
            Interrupts(checkpoints.settings.enabled and learner.resumes_inside) as interrupts,
        ):
            title = f"{identity.stream} · {identity.strategy} · seed {loop.seed}: {directory}"
            chosen = strategy.remarks(learner)
            said = guarding.lines() if guarding else ()
            for note in (title, *notes, *room.lines(), *chosen, *said):
                progress.note(note)
            if resume:
                last = follow(checkpoints, last)
                progress.note(_where_from(last, stream))
            if guarding and last is None:  # a resumed run has said so before
                record.guards(**guarding.facts())
            progress.start([task.name for task in stream])
            learning, costs = _learned(
                parts, engine, record, progress, checkpoints, interrupts, last
            )
            summary = record.finish(**costs, **memory.read(), **learning.summary())
            progress.stop()
            if rank() == 0:
                _show(directory, record, learning, progress)
                _stop_completed(interrupts)
    return Result(directory, record.matrix, summary, learner, strategy)


def _checked(parts: _Parts, sharded: bool) -> Guards | None:
    """What the strategy guards, once all that must be so before a run has been seen to."""
    strategy, learner = parts.strategy, parts.learner
    if world() > 1:
        check_together(learner)
        synchronise(learner)
    if sharded:
        check_sharded(strategy, parts.probe, learner.network, parts.alignment.enabled)
        with quiet_lightning():
            precision = str(parts.trainer(callbacks=[]).precision)
        if precision in HALVING:  # the Trainer would do it to parts that are shared out
            learner.network.to(HALVING[precision])
            learner.remember_initial_state()
        pulled = [m for m in strategy.members if not m.needs.freezes_weights]
        learner.shard(HALF.get(precision), cut_again=any(map(penalises_weights, pulled)))
    strategy.check(learner)
    return guards(strategy, learner)


@contextmanager
def _workplace(directory: Path) -> Iterator[Path]:
    """Where this process records: of several, the first in the run's directory."""
    if rank() == 0:
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="cl_bench-") as scratch:
        yield Path(scratch)


def _learned(
    parts: _Parts,
    engine: Callable[..., Engine],
    record: Record,
    progress: ProgressDisplay,
    checkpoints: Checkpoints,
    interrupts: Interrupts,
    last: Checkpoint | None,
) -> tuple[Engine, dict[str, Any]]:
    """Watch, pre-train, and learn all tasks, or those that are left; and what that cost."""
    stream, strategy, learner, loop = parts.stream, parts.strategy, parts.learner, parts.loop
    observer = watch(
        stream,
        learner,
        record,
        alignment=parts.alignment,
        probe=parts.probe,
        evaluation=parts.evaluation,
        loop=loop,
    )
    _pretrain(parts, observer, record, progress, interrupts, last)
    kept = checkpoints if checkpoints.settings.enabled else None
    state = RunState(learner, strategy, observer, record, kept)
    state.stream = stream
    learning = engine(
        learner, strategy, parts.trainer, loop, observer, record, progress, state, interrupts
    )
    begin = state.restore(last) if last else None
    answer = functools.partial(answers, learner)
    Experiment(stream, strategy, learning, parts.evaluation, record, progress, answer).run(begin)
    costs = _costs(state, checkpoints, observer)
    return learning, {**costs, **describe_budget(learner, strategy, stream)}


def _pretrain(
    parts: _Parts,
    observer: Observer | None,
    record: Record,
    progress: ProgressDisplay,
    interrupts: Interrupts,
    last: Checkpoint | None,
) -> None:
    """What the stream asks for before its first task, if it asks for anything."""
    learner, wanted = parts.learner, parts.stream.pretraining
    if wanted is None:
        return
    watching = observer or Observer()
    with learner.put_together():
        watching.before_pretraining(learner)
    steps = itertools.count(1)

    def stop() -> None:
        if world() == 1 or (next(steps) % ASK_EVERY == 0 and interrupts.agree()):
            interrupts.stop()  # all of them after the same step

    came = pretrain(learner, wanted, parts.trainer, parts.loop.seed, progress, stop)
    progress.note(_from_where(came))
    if last is None:  # a resumed run has said so before
        record.status("pretrained", **asdict(came))
    with learner.put_together():
        watching.after_pretraining(learner)


def _costs(state: RunState, checkpoints: Checkpoints, observer: Observer | None) -> dict[str, Any]:
    """Steps, and what checkpoints and probes took."""
    probed = {"probe_seconds": observer.seconds} if isinstance(observer, Observers) else {}
    return {
        "optimizer_steps": state.optimizer_steps,
        "checkpoint_bytes": state.largest,
        "checkpoint_seconds": checkpoints.seconds,
        "weights_bytes": checkpoints.weights.nbytes,
        **probed,
    }


def _show(directory: Path, record: Record, learning: Engine, progress: ProgressDisplay) -> None:
    """Draw and print what the finished run came to."""
    pictures = (*write_figures(directory), *write_probe_figures(directory))
    record.figures([*pictures, *learning.figures(directory)])
    progress.note("")
    print_run(directory, progress.console)
    for remark in (*learning.remarks(), f"\neverything about this run is in {directory}"):
        progress.note(remark)


def _stop_completed(interrupts: Interrupts) -> None:
    """A signal that came since the last task ends a sweep after this run."""
    try:
        interrupts.stop()
    except BaseException as stop:
        stop.add_note(COMPLETED)
        raise


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
