"""Weights & Biases beside the plain files, through Lightning's ``WandbLogger``.

Axes: ``eval/*`` and ``layers/*`` run over ``task``, the number of tasks learned; ``train/*`` over
``global_epoch``, which goes on counting from task to task. W&B's own step is the number of the
event in ``results.jsonl``. The run's summary holds what ``summary.json`` holds (``acc``, ``bwt``,
...), which is what a sweep optimises.

A run that is resumed goes on under its id, kept in ``wandb_id.txt``. W&B loses what it
had not written yet when a process is killed, so everything recorded before is sent again, under
its former steps: online, what the server has is left out; offline, every process leaves a
segment of its own in ``wandb``, the last one is complete, and ``wandb sync`` takes them in order.
"""

import contextlib
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cl_bench.contracts.checking import checked
from cl_bench.metrics import Matrix
from cl_bench.tracking.files import write_atomically
from cl_bench.tracking.reading import is_mixed_run
from cl_bench.tracking.tables import Event

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger

ID = "wandb_id.txt"

AFTER_TASKS = (
    *("alignment", "dynamics", "landscape", "connectivity", "divergence"),
    *("general_text", "general", "cost"),
)
"""Probes that measure once a task."""

FINISH_TIMEOUT = 120.0
"""Seconds an upload may hold up the end of a run; ``wandb sync`` sends what was left over."""


@checked("logger.")
def wandb_sink(
    directory: Path | str,
    config: Mapping[str, Any],
    *,
    mode: Literal["online", "offline", "disabled"] = "offline",
    project: str = "cl_bench",
    entity: str | None = None,
    group: str | None = None,
    name: str | None = None,
    tags: Sequence[str] = (),
) -> "WandbSink | None":
    """The sink that ``logger.mode`` asks for; None where it is ``disabled``.

    Args:
        directory: of the run; W&B's files go to ``wandb`` in it.
        config: the resolved configuration, as plain dictionaries.
        mode: ``online``, ``offline`` (``wandb sync`` sends it later) or ``disabled``.
        project: as in W&B.
        entity: as in W&B.
        group: as in W&B.
        name: of the W&B run; None means the last three parts of ``directory``.
        tags: as in W&B.
    """
    if mode == "disabled":
        return None
    path = Path(directory)
    return WandbSink(
        path,
        config,
        mode=mode,
        project=project,
        entity=entity,
        group=group,
        name=name or "/".join(path.absolute().parts[-3:]),
        tags=list(tags),
    )


class WandbSink:
    """Sends what the record gets to one W&B run. Nothing is started, nor imported, before it.

    Args:
        directory: of the run.
        config: the resolved configuration.
        mode: ``online`` or ``offline``.
        options: further arguments of ``wandb.init``.
    """

    name = "Weights & Biases"

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        mode: Literal["online", "offline"],
        **options: Any,
    ) -> None:
        self._directory = directory
        self._init = {"dir": str(directory), "config": dict(config), "mode": mode, **options}
        self._logger: WandbLogger | None = None
        self._task_names: list[str] = []
        self._mixed = False
        self._global_epoch = self._global_steps = 0
        self._global_round = 0
        self._events = 0

    @property
    def started(self) -> bool:
        """Whether there is a W&B run."""
        return self._logger is not None

    @property
    def logger(self) -> "WandbLogger":
        """Lightning's logger around the W&B run, once :meth:`start` was called."""
        if self._logger is None:
            raise RuntimeError("the W&B run has not been started")
        return self._logger

    def start(self, task_names: Sequence[str]) -> None:
        """Start the W&B run, or go on with it, and declare its axes."""
        import wandb
        from lightning.pytorch.loggers import WandbLogger

        # WandbLogger could start the run itself; but then it would leave WANDB_MODE set for the
        # next job of this process, join a run somebody else has open, and put every metric on
        # "trainer/global_step", which starts anew with each task's Trainer.
        run = wandb.init(
            **self._init,
            id=self._id(),
            # Offline, W&B puts segments together by their id when they are synchronised.
            resume="allow" if self._init["mode"] == "online" else None,
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", finish_timeout=FINISH_TIMEOUT),
        )
        self._logger = WandbLogger(experiment=run)
        self._task_names = list(task_names)
        self._mixed = is_mixed_run(self._directory)
        run.define_metric("task")
        run.define_metric("eval/*", step_metric="task")
        run.define_metric("layers/*", step_metric="task")
        for probe in AFTER_TASKS:
            run.define_metric(f"{probe}/*", step_metric="task")
        run.define_metric("curve_step")
        run.define_metric("curve/*", step_metric="curve_step")
        run.define_metric("global_epoch")
        run.define_metric("train/*", step_metric="global_epoch")
        run.define_metric("global_steps")
        run.define_metric("steps/*", step_metric="global_steps")

    def _id(self) -> str:
        path = self._directory / ID
        with contextlib.suppress(FileNotFoundError):
            return path.read_text().strip()
        made = secrets.token_hex(4)
        write_atomically(path, f"{made}\n".encode())
        return made

    def resume(self, events: Sequence[Event]) -> None:
        """Send what was recorded before, as far as it is missing."""
        for event in events:
            self.event(event)

    def event(self, event: Event) -> None:
        """Log an epoch, an evaluation or numbers per layer."""
        self._events += 1
        if event["event"] == "epoch":
            self._global_epoch += 1
            keys = ("train_loss", "learning_rate", "seconds", "steps")
            values = {f"train/{k.removeprefix('train_')}": event[k] for k in keys}
            self._log(values, global_epoch=self._global_epoch)
        elif event["event"] == "steps":
            self._global_steps += 1
            values = {"steps/loss": event["train_loss"], "steps/rate": event["learning_rate"]}
            self._log(values, global_steps=self._global_steps)
        elif event["event"] == "evaluation":
            scores = event["scores"]
            values = {f"eval/{name}": score for name, score in scores.items()}
            seen = [scores.get(name) for name in self._task_names[: event["row"]]]
            if seen and None not in seen and not self._mixed:
                values["eval/mean_over_seen"] = sum(seen) / len(seen)
            for name, measures in event.get("details", {}).items():
                values |= {f"eval/{name}/{measure}": v for measure, v in measures.items()}
            self._log(values, task=event["row"])
        elif event["event"] == "layers":
            values = {
                f"layers/{layer}/{quantity}": value
                for layer, quantities in event["layers"].items()
                for quantity, value in quantities.items()
            }
            self._log(values, task=event["task"] + 1)
        elif event["event"] == "probe":
            self._probe(event)
        elif event["event"] == "round":
            if self._global_round == 0:
                run = self.logger.experiment
                run.define_metric("global_round")
                run.define_metric("round/*", step_metric="global_round")
                run.define_metric("federation/*", step_metric="task")
            self._global_round += 1
            values = {
                f"round/{k}": v for k, v in event.items() if k not in ("event", "time", "round")
            }
            self._log(values, global_round=self._global_round)
        elif event["event"] in ("federation", "clients"):
            facts = event.get("summary", event)
            plain = {k: v for k, v in facts.items() if isinstance(v, int | float)}
            values = {f"federation/{k}": v for k, v in plain.items() if k != "task"}
            self._log(values, task=event["task"] + 1)

    def _probe(self, event: Event) -> None:
        name, values = event["probe"], flat("", event["values"])
        if name == "cost":
            values = flat("", {"seconds": event["seconds"]})
        if name != "curve" and not event.get("inside"):
            learned = event["row"] if name == "general" else event["task"] + 1
            self._log({f"{name}/{k}": v for k, v in values.items()}, task=learned)
            return
        # Curves of all tasks share one axis, a name each.
        values |= flat("", event.get("details", {}))
        where = f"curve/task_{event['task'] + 1}" + ("" if name == "curve" else f"/{name}")
        self._log({f"{where}/{k}": v for k, v in values.items()}, curve_step=event["step"])

    def finish(self, summary: Mapping[str, Any], task_names: Sequence[str], R: Matrix) -> None:
        """Put the summary where sweeps look, and matrices into tables."""
        plain = {k: v for k, v in summary.items() if k not in ("confusion_by_task", "general")}
        self.logger.experiment.summary.update(numbers(plain))
        if confusion := summary.get("confusion_by_task"):
            names = task_names[: len(confusion)]
            self.logger.log_table(
                "confusion_by_task",
                columns=["task", *names],
                data=[[n, *row] for n, row in zip(names, confusion, strict=True)],
            )
        for task, values in (summary.get("general") or {}).items():
            found = {f"general/{task}/{k}": v for k, v in values.items()}
            self.logger.experiment.summary.update(numbers(found))
        self.logger.log_table(
            "accuracy_matrix",
            columns=["after_task", *task_names],
            data=[[i, *(None if math.isnan(v) else float(v) for v in R[i])] for i in range(len(R))],
        )

    def figures(self, paths: Sequence[Path]) -> None:
        """Upload pictures under their file's name."""
        for path in paths:
            self.logger.log_image(f"figures/{path.stem}", [str(path)])

    def close(self, failed: bool) -> None:
        """End the W&B run."""
        self.logger.experiment.finish(exit_code=int(failed))

    def _log(self, values: Mapping[str, Any], **axis: int) -> None:
        found = numbers(values)
        if found and self._events >= self.logger.experiment.step:
            # Lightning's log_metrics would leave the step to W&B, which counts calls.
            self.logger.experiment.log({**found, **axis}, step=self._events)


def flat(where: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested numbers by their path."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{where}/{key}" if where else str(key)
        found |= flat(path, value) if isinstance(value, Mapping) else {path: value}
    return found


def numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is not there: W&B would plot it as text."""
    return {
        k: v
        for k, v in values.items()
        if v is not None and not (isinstance(v, float) and math.isnan(v))
    }
