"""Loggers beside the files of a run, and telling all of them."""

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cl_bench.metrics import Matrix
from cl_bench.tracking.tables import Event


class Sink(Protocol):
    """A logger beside the files. Whatever it raises costs the run nothing but the sink."""

    name: str
    """For the warning when it fails."""

    def start(self, task_names: Sequence[str]) -> None:
        """The run begins, or is resumed."""

    def resume(self, events: Sequence[Event]) -> None:
        """After :meth:`start`: what was recorded, and told, before this process."""

    def event(self, event: Event) -> None:
        """One line of ``results.jsonl``, as a reader gets it."""

    def finish(self, summary: Mapping[str, Any], task_names: Sequence[str], R: Matrix) -> None:
        """The run ended: what ``summary.json`` holds, and the accuracy matrix."""

    def figures(self, paths: Sequence[Path]) -> None:
        """Pictures of the finished run."""

    def close(self, failed: bool) -> None:
        """Nothing more comes."""


class Sinks:
    """The loggers of one run.

    Args:
        sinks: all of them.
        directory: of the run, whose files go on without them.
    """

    def __init__(self, sinks: Sequence[Sink], directory: Path) -> None:
        self._sinks = list(sinks)
        self._directory = directory

    def tell(self, call: Callable[[Sink], None]) -> None:
        """Call every sink; one that raises is dropped with a warning, and the run goes on."""
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:
                self._sinks.remove(sink)
                # What it sent so far should arrive, and its processes should end.
                with contextlib.suppress(Exception):
                    sink.close(failed=True)
                warnings.warn(
                    f"{sink.name} failed and gets nothing more of this run "
                    f"({type(error).__name__}: {error}); the files in {self._directory} go on",
                    stacklevel=3,
                )

    def close(self, failed: bool) -> None:
        """Nothing more comes, for any of them."""
        self.tell(lambda sink: sink.close(failed))
        self._sinks = []
