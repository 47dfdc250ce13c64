"""Any of Lightning's loggers beside the plain files: TensorBoard, CSV, MLflow, ...

Scores stand at the number of tasks learned, the training loss at the epochs of all tasks counted
through, and what probes measure at the task after which they did. A run that is resumed sends
everything again: loggers that keep what they had then show it twice.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from cl_bench.metrics import Matrix
from cl_bench.tracking.reading import is_mixed_run
from cl_bench.tracking.tables import Event
from cl_bench.tracking.wandb import flat, numbers


class LightningSink:
    """Sends what the record gets to one of Lightning's loggers.

    Args:
        name: of the logger, for messages.
        directory: of the run.
        make: makes it, when the run begins.
        config: the resolved configuration.
    """

    def __init__(
        self, name: str, directory: Path, make: Callable[[], Logger], config: Mapping[str, Any]
    ) -> None:
        self.name = name
        self._directory = directory
        self._make = make
        self._config = dict(config)
        self._epochs = self._steps = 0
        self._task_names: list[str] = []

    def start(self, task_names: Sequence[str]) -> None:
        """Make the logger, and tell it the configuration."""
        self._task_names = list(task_names)
        self._logger = self._make()
        self._logger.log_hyperparams(self._config)

    def resume(self, events: Sequence[Event]) -> None:
        """Everything again."""
        for event in events:
            self.event(event)

    def event(self, event: Event) -> None:
        """Numbers of an event."""
        if event["event"] == "epoch":
            self._epochs += 1
            values = {f"train/{k}": event[k] for k in ("train_loss", "learning_rate")}
            self._log(values, self._epochs)
        elif event["event"] == "steps":
            self._steps += 1
            values = {"steps/loss": event["train_loss"], "steps/rate": event["learning_rate"]}
            self._log(values, self._steps)
        elif event["event"] == "evaluation":
            scores = {f"eval/{name}": score for name, score in event["scores"].items()}
            seen = [event["scores"].get(name) for name in self._task_names[: event["row"]]]
            if seen and None not in seen and not is_mixed_run(self._directory):
                scores["eval/mean_over_seen"] = sum(seen) / len(seen)
            self._log({**scores, **flat("eval", event.get("details", {}))}, event["row"])
        elif event["event"] == "layers":
            self._log(flat("layers", event["layers"]), event["task"] + 1)
        elif event["event"] == "probe" and not event.get("inside") and event["probe"] != "curve":
            learned = event.get("row", event["task"] + 1)
            self._log(flat(event["probe"], event["values"]), learned)

    def finish(self, summary: Mapping[str, Any], task_names: Sequence[str], R: Matrix) -> None:
        """The numbers of the summary."""
        self._log(flat("summary", summary), len(task_names))

    def figures(self, paths: Sequence[Path]) -> None:
        """Pictures stay where they are: these loggers agree on numbers alone."""

    def close(self, failed: bool) -> None:
        """Write what is left."""
        self._logger.save()
        self._logger.finalize("failed" if failed else "success")

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        plain = {
            k: float(v)
            for k, v in numbers(values).items()
            if isinstance(v, int | float) and not isinstance(v, bool)
        }
        if plain:
            self._logger.log_metrics(plain, step=step)
            self._logger.save()
