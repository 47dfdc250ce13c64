"""The progress of a run: a live line on a terminal, plain lines in a log.

On a terminal, one line is redrawn at most four times a second and a permanent line appears per
task. Anywhere else nothing is ever redrawn: a line per task, and a heartbeat every half minute.
"""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cl_bench.metrics import Matrix, summarise
from cl_bench.metrics.mixed import is_mixed

REFRESH_SECONDS = 0.25
HEARTBEAT_SECONDS = 30.0

BAR_WIDTH = 24


class ProgressDisplay:
    """Shows task, epoch, speed, loss and time left; a context manager that restores the terminal.

    Args:
        console: where to; standard output by default. What it says about being a terminal decides
            between the live line and the log.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._is_live = self.console.is_terminal and not self.console.is_dumb_terminal
        self._interval = REFRESH_SECONDS if self._is_live else HEARTBEAT_SECONDS
        self._live: Live | None = None
        self._names: list[str] = []
        self._task_seconds: list[float] = []
        # advance() runs once per training step and reads nothing but these two.
        self._done = 0
        self._next = float("inf")
        self._before = 0
        self._index = 0
        self._steps = 0
        self._epoch = ""
        self._stage = ""
        self._began = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self, task_names: Sequence[str]) -> None:
        """The run begins: these tasks will be learned, in this order."""
        self._names = list(task_names)
        if self._is_live:
            # No thread of its own: it would take turns with the training loop.
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()

    def stage(self, name: str, steps: int) -> None:
        """Something that belongs to no task begins; it takes up to ``steps`` steps."""
        self._begin(0, steps, name)

    def task(self, index: int, steps: int, before: int = 0) -> None:
        """Training on the task with index ``index`` begins, or goes on.

        Args:
            index: of the task.
            steps: that the whole task takes at most.
            before: steps of it that were done before a resume.
        """
        self._begin(index, steps, before=before)

    def _begin(self, index: int, steps: int, stage: str = "", before: int = 0) -> None:
        self._index, self._steps, self._before = index, steps, before
        self._done, self._epoch, self._stage = 0, "", stage
        self._began = time.monotonic()
        self._next = self._began + self._interval
        if self._live:
            self._show(self._began)

    def advance(self, steps: int = 1) -> None:
        """So many more steps are done. Costs a clock reading, except when it is time to redraw."""
        self._done += steps
        if time.monotonic() >= self._next:
            now = time.monotonic()
            self._next = now + self._interval
            self._show(now)

    def epoch(self, epoch: int, max_epochs: int, loss: float) -> None:
        """``epoch`` of at most ``max_epochs`` epochs are done, the last with this mean loss."""
        self.say(f"epoch {epoch}/{max_epochs}  loss {loss:.4g}")

    def say(self, facts: str) -> None:
        """What to show beside speed and time from now on."""
        self._epoch = facts

    def evaluated(
        self,
        R: Matrix,
        learned: int,
        seconds: float,
        layers: Mapping[str, Mapping[str, float]] | None = None,
        metrics: Sequence[str] = (),
    ) -> None:
        """Print the line of a finished task.

        Args:
            R: accuracy matrix so far, (T + 1, T).
            learned: number of tasks learned, at least 1.
            seconds: what the task took.
            layers: its numbers per layer, ``{layer: {quantity: value}}``; ``rank`` is shown.
            metrics: of every task; where they differ, no mean is made.
        """
        if not self._before:
            self._task_seconds.append(seconds)
        self._next = float("inf")
        so_far = summarise(R[: learned + 1, :learned])
        metric = metrics[learned - 1] if metrics else "accuracy"
        said = "acc" if metric == "accuracy" else metric
        line = f"{self._label(learned - 1)}  {said} {_percent(R[learned, learned - 1])}"
        if not is_mixed(metrics):
            line += f"  mean over seen {_percent(so_far['acc'])}"
            line += f"  bwt {_percent(so_far['bwt'], signed=True)}" if learned > 1 else " " * 11
        ranks = [f"{v['rank']:.0f}" for v in (layers or {}).values() if "rank" in v]
        if ranks:
            line += f"  rank {'/'.join(ranks)}"
        if self._live:
            self._live.update("", refresh=True)
        self.note(f"{line}  {seconds:.1f} s")

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Nothing more comes: give the terminal back. May be called twice."""
        self._next = float("inf")
        if self._live:
            self._live.stop()
            self._live = None

    def _show(self, now: float) -> None:
        seconds = now - self._began
        rate = self._done / seconds if seconds > 0 else 0.0
        facts = "  ".join(
            part
            for part in (
                self._epoch,
                f"{rate:,.0f} steps/s" if self._done else "",
                f"{_clock(self._left(seconds))} left" if self._done else "",
            )
            if part
        )
        if self._live is None:
            share = (self._before + self._done) / max(self._steps, 1)
            self.note(f"{self._stage or self._label(self._index)}  {share:4.0%}  {facts}")
            return
        label = self._stage or self._label(self._index)
        # The words matter more than the bar where the terminal is narrow.
        room = self.console.width - len(label) - len(facts) - 5
        bar = ProgressBar(
            total=max(self._steps, 1),
            completed=self._before + self._done,
            width=max(1, min(BAR_WIDTH, room)),
        )
        line = Table.grid(padding=(0, 2))
        for _ in range(3):
            line.add_column(no_wrap=True)
        line.add_row(Text(label, style="bold"), bar, Text(facts, style="dim"))
        self._live.update(line, refresh=True)

    def _left(self, seconds: float) -> float:
        """Seconds until the last task is done, if every task takes what they took so far."""
        # A task may stop early, so what finished tasks took counts for more than its step count.
        each = seconds / max(self._done, 1)
        this = each * max(self._steps - self._before - self._done, 0)
        if self._stage:
            return this
        known = self._task_seconds or [each * self._steps]
        return this + (len(self._names) - self._index - 1) * sum(known) / len(known)

    def _label(self, index: int) -> str:
        total, width = len(self._names), max(map(len, self._names), default=0)
        number = f"{index + 1}".rjust(len(str(total)))
        return f"task {number}/{total} {self._names[index].ljust(width)}"


def _percent(value: float, signed: bool = False) -> str:
    return f"{100 * value:{'+' if signed else ''}5.1f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
