"""The live display: a line per task in logs, a terminal redrawn now and then."""

import io
import sys
import time

import numpy as np
import pytest
from recorded import NAMES
from rich.console import Console

from cl_bench.tracking import ProgressDisplay

R = np.array([[0.1, 0.1], [0.931, 0.2], [0.919, 0.95]])


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("cl_bench.tracking.progress.time.monotonic", clock)
    return clock


def display(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, _environ={"TERM": "xterm"})
    return ProgressDisplay(console), out


def test_a_log_gets_a_line_per_task_without_control_characters(clock):
    shown, out = display(terminal=False)
    with shown:
        shown.start(NAMES)
        for task in range(2):
            shown.task(task, steps=100)
            shown.advance(100)
            shown.epoch(1, 1, 0.5)
            layers = {"net.0": {"rank": 120}, "net.2": {"rank": 88}}
            shown.evaluated(R, task + 1, 8.25, layers)
    assert out.getvalue().splitlines() == [
        "task 1/2 perm-1  acc  93.1  mean over seen  93.1             rank 120/88  8.2 s",
        "task 2/2 perm-2  acc  95.0  mean over seen  93.5  bwt  -1.2  rank 120/88  8.2 s",
    ]


def test_a_log_has_a_heartbeat_at_most_every_30_seconds(clock):
    shown, out = display(terminal=False)
    shown.start(NAMES)
    shown.task(0, steps=1000)
    for _ in range(65):
        clock.now += 1
        shown.advance(10)
    shown.epoch(3, 5, 0.12345)
    clock.now += 25
    shown.advance(50)
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0] == "task 1/2 perm-1   30%  10 steps/s  2:50 left"
    assert lines[2] == "task 1/2 perm-1   70%  epoch 3/5  loss 0.1235  8 steps/s  2:47 left"


def test_after_a_resume_later_tasks_are_expected_to_take_all_their_steps(clock):
    shown, out = display(terminal=False)
    shown.start(NAMES)
    shown.task(0, steps=1000, before=400)
    for _ in range(30):
        clock.now += 1
        shown.advance(10)
    # 30 s for 300 steps: 30 s for the 300 left of this task, 100 s for the whole next one.
    assert out.getvalue().splitlines() == ["task 1/2 perm-1   70%  10 steps/s  2:10 left"]
    shown.advance(300)
    shown.evaluated(R, 1, 60.0)
    shown.task(1, steps=1000)
    for _ in range(50):
        clock.now += 1
        shown.advance(10)
    assert out.getvalue().splitlines()[-1] == "task 2/2 perm-2   30%  10 steps/s  1:10 left"


def test_a_terminal_is_redrawn_at_most_four_times_a_second(clock):
    shown, _ = display(terminal=True)
    with shown:
        shown.start(NAMES)
        shown.task(0, steps=1000)
        drawn = []
        shown._live.update = lambda *_, **__: drawn.append(clock.now)
        for _ in range(1000):
            clock.now += 0.01
            shown.advance()
    assert len(drawn) == pytest.approx(40, abs=2)


def test_the_terminal_is_restored_after_an_error():
    shown, out = display(terminal=True)
    stdout = sys.stdout

    def die():
        with shown:
            shown.start(NAMES)
            shown.task(0, steps=10)
            shown.advance(5)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        die()
    hidden, visible = "\x1b[?25l", "\x1b[?25h"
    assert out.getvalue().rindex(visible) > out.getvalue().rindex(hidden)
    assert sys.stdout is stdout
    shown.stop()


def test_time_left_counts_what_finished_tasks_took(clock):
    shown, out = display(terminal=False)
    shown.start(["a", "b", "c"])
    shown.evaluated(np.full((4, 3), 0.5), 1, seconds=60.0)
    shown.task(1, steps=100)
    clock.now += 30
    shown.advance(50)
    assert out.getvalue().splitlines()[-1].endswith("1:30 left")


def test_a_step_costs_next_to_nothing():
    shown, _ = display(terminal=False)
    shown.start(NAMES)
    shown.task(0, steps=10**9)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(20_000):
            shown.advance(1)
        best = min(best, (time.perf_counter() - start) / 20_000)
    # 100 to 200 ns here; a slow machine under load still stays below a thousandth of a step.
    assert best < 2e-6


def test_names_with_brackets_are_printed_as_they_are():
    shown, out = display(terminal=False)
    shown.start(["[red]", "b"])
    shown.evaluated(R, 1, 1.0)
    assert "[red]" in out.getvalue()
