"""The record of somebody else's loop: the same files, table and pictures as of our runs."""

import inspect
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import yaml
from rich.console import Console
from torch import Tensor

from cl_bench.contracts import IGNORE, UsageError
from cl_bench.experiment import AlignmentObserver, AlignmentSettings
from cl_bench.experiment.determinism import describe_compute
from cl_bench.experiment.identity import Identity, new_directory
from cl_bench.integrations.outputs import is_text
from cl_bench.integrations.sample import Sample, SampledTask, as_batch
from cl_bench.learners.evaluation import SCORE
from cl_bench.metrics import Matrix
from cl_bench.metrics import divergence as moved_by
from cl_bench.parallel.ranks import decided, rank
from cl_bench.report import print_run, write_figures
from cl_bench.tracking import Record, open_record

Loaders = Mapping[str, Iterable[Sample]] | Sequence[Iterable[Sample]]
"""Test data, a loader a task: batches ``(x, y)`` or tensors by name, as often as it is asked."""


class Report:
    """Scores all tasks before the first and after each, and writes down what our runs do.

    A context manager around the loop over the tasks.

    Args:
        guard: the :class:`Guarded` whose model is scored.
        loaders: of test data.
        run_dir: where to; None takes ``runs/<stream>/<strategy>/<time>-seed<k>``.
        stream: what the tasks are called together.
        alignment: whether to measure what updates do to the subspaces of old inputs.
        divergence: test samples of the new task, and of each old one, on which to measure how far
            a task moves what the model says; 0 measures nothing.

    Attributes:
        directory: of the record.
        divergence: by the task that was learned, then by the task whose data it is: the mean of
            KL(before || after) in nats, over samples, or labelled tokens.
        summary: what ``summary.json`` holds, once the block is left.

    Raises:
        UsageError: there is no loader, the directory holds a run, or the loss is not known.
    """

    def __init__(
        self,
        guard: Any,
        loaders: Loaders,
        run_dir: Path | str | None = None,
        stream: str = "own_loop",
        alignment: bool = True,
        divergence: int = 0,
    ) -> None:
        if type(divergence) is not int or divergence < 0:
            raise UsageError(
                f"report: divergence={divergence!r}: a number of samples, or 0 for none"
            )
        if not isinstance(loaders, Mapping):
            loaders = {f"task_{i}": loader for i, loader in enumerate(loaders)}
        self.loaders: dict[str, Iterable[Sample]] = dict(loaders)
        if not self.loaders:
            raise UsageError("report: give test data, a loader a task")
        self.guard, self.stream = guard, stream
        self.divergence: dict[str, dict[str, float]] = {}
        self._samples = divergence
        self._start: list[Tensor] = []
        learner = guard.learner
        for name, loader in self.loaders.items():
            first = next(iter(loader), None)
            if first is None or iter(loader) is loader:
                raise UsageError(f"report: the loader of {name!r} is empty, or can be read once")
            if alignment and learner._loss is None and not hasattr(learner.network, "config"):
                raise UsageError(
                    "report: alignment takes gradients of the loss: give Guarded(..., "
                    "loss=F.cross_entropy) (or yours), or alignment=False"
                )
        kind = type(guard.strategy.members[0])
        identity = Identity(stream, kind.__name__.lower())
        chosen = Path(run_dir) if run_dir else decided(lambda: new_directory(identity, self._seed))
        self.directory = chosen
        self._elsewhere: tempfile.TemporaryDirectory[str] | None = None
        if rank():
            self._elsewhere = tempfile.TemporaryDirectory(prefix="cl_bench-")
            chosen = Path(self._elsewhere.name)
        bound = {} if guard.strategy.bound is None else {"bound": guard.strategy.bound}
        facts = {"stream": stream, "strategy": identity.strategy, "seed": self._seed, **bound}
        self.record: Record = open_record(
            chosen,
            list(self.loaders),
            task_id_known=learner.task_id_at_test,
            config=yaml.safe_dump(self._settings(), sort_keys=False),
            command=shlex.join([Path(sys.executable).name, *sys.argv]),
            data={"stream": stream, "scenario": learner.scenario, "tasks": []},
            environment=describe_compute(),
            facts=facts,
        )
        self.summary: dict[str, Any] = {}
        self._alignment = None
        if alignment:
            settings = AlignmentSettings()
            self._alignment = AlignmentObserver(settings, learner.batch_size, self._seed)

    @property
    def _seed(self) -> int:
        return int(self.guard.learner.seed)

    @property
    def matrix(self) -> Matrix:
        """R so far, (T + 1, T), NaN where nothing was evaluated."""
        return self.record.matrix

    def _settings(self) -> dict[str, Any]:
        """What is known of the run, as a configuration."""
        strategy = self.guard.strategy.members[0]
        options = {
            name: value
            for name in inspect.signature(type(strategy)).parameters
            if isinstance(value := getattr(strategy, name, None), str | int | float | bool)
        }
        kind = type(strategy)
        return {
            "strategy": {"_target_": f"{kind.__module__}.{kind.__qualname__}", **options},
            "model": {"_target_": type(self.guard.learner.network).__qualname__},
            "seed": self._seed,
        }

    def __enter__(self) -> Self:
        if self.guard.watching is not None:
            raise UsageError("report: the guard has one already")
        self.record.__enter__()
        self.guard.watching = self
        self._score(None)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.guard.watching = None
        if kind is None:
            self.summary = self.record.finish()
            self.record.figures(write_figures(self.record.directory))
        self.record.__exit__(kind, error, traceback)
        if kind is None and rank() == 0:
            print_run(self.directory, Console())
        if self._elsewhere is not None:
            self._elsewhere.cleanup()

    # -- what the guard tells ---------------------------------------------------------------------

    def before(self, task: SampledTask) -> None:
        """A task was set up, and nothing has moved."""
        if task.index >= len(self.loaders):
            raise UsageError(f"report: {len(self.loaders)} loaders, and this is one more task")
        if self._alignment is not None:
            self._alignment.before_task(self.guard.learner, task)
        if self._samples:
            self._start = self._said(task.index + 1)

    def epoch(self, task: SampledTask, epoch: int, loss: float, rate: float, steps: int) -> None:
        """An epoch is over."""
        self.record.epoch(task.index, epoch, loss, rate, seconds=0.0, steps=steps)

    def after(self, task: SampledTask) -> None:
        """A task was learned and released."""
        found = {name: dict(values) for name, values in self.guard.strategy.metrics().items()}
        if self._alignment is not None:
            watched = self._alignment.after_task(self.guard.learner, task)
            for name, values in watched.items():
                found.setdefault(name, {}).update(values)
        if found:
            self.record.layers(task.index, found)
        if self._samples:
            self._moved(task)
        self._score(task)

    def _moved(self, task: SampledTask) -> None:
        """How far the task has moved what the model says of its own data, and of older tasks'."""
        began, names = time.perf_counter(), list(self.loaders)
        now = self._said(task.index + 1)
        found = {
            name: moved_by(start, end)
            for name, start, end in zip(names, self._start, now, strict=False)
        }
        self.divergence[names[task.index]] = found
        self.record.probe(
            "divergence",
            task=task.index,
            values={
                name: {"kl": kl, "new": int(i == task.index)}
                for i, (name, kl) in enumerate(found.items())
            },
            samples=self._samples,
            seconds=time.perf_counter() - began,
        )

    def _said(self, count: int) -> list[Tensor]:
        """Log-probabilities (n, C) for so many tasks: of test samples, or labelled tokens."""
        learner, found = self.guard.learner, []
        for i, loader in enumerate(list(self.loaders.values())[:count]):
            left, said = self._samples, []
            for batch in loader:
                few = {k: v[:left] for k, v in _named(as_batch(batch)).items()}
                out = self.guard.predict(few, i if learner.task_id_at_test else None)
                if is_text(few):
                    logits, labels = learner._tokens(out, few)
                    out = logits[labels.to(out.device) != IGNORE]
                said.append(out.float().log_softmax(-1).cpu())
                left -= len(next(iter(few.values())))
                if left <= 0:
                    break
            found.append(torch.cat(said))
        return found

    def _score(self, task: SampledTask | None) -> None:
        """A row of the matrix."""
        began, guard = time.perf_counter(), self.guard
        learner, seen = guard.learner, len(guard.met)
        tasks = list(guard.met)
        if learner.scenario == "domain":
            shape = torch.zeros(1)
            classes = tasks[-1].classes if tasks else range(0)
            tasks += [SampledTask(shape, t, classes).bare() for t in range(seen, len(self.loaders))]
        learner.expect_tests(tasks)
        try:
            with torch.no_grad(), learner.evaluating():
                for i, loader in enumerate(list(self.loaders.values())[: len(tasks)]):
                    for batch in loader:
                        named = _named(as_batch(batch))
                        learner.test_step(learner._to_device(guard.told(named, i)), 0, i)
        finally:
            learner.end_tests()
        means = learner.test_means()
        names = list(self.loaders)[: len(tasks)]
        self.record.row(
            row=seen,
            task=None if task is None else task.index,
            scores={name: found.pop(SCORE) for name, found in zip(names, means, strict=True)},
            seconds=time.perf_counter() - began,
            details=dict(zip(names, means, strict=True)),
        )


def _named(batch: dict[str, Any]) -> dict[str, Any]:
    """Names that scores go by: images and their labels as ``x`` and ``y``."""
    if is_text(batch) or "pixel_values" not in batch:
        return batch
    return {{"pixel_values": "x", "labels": "y"}.get(k, k): v for k, v in batch.items()}
