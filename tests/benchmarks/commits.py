"""The rows of ``make bench`` at two commits, in turns on one CPU thread, fastest tenth of each.

    python tests/benchmarks/commits.py BEFORE [AFTER] --turns 30

A process of each commit's worktree takes turns of some tenths of a second, so that what else the
machine does falls on both alike. Exit status 1 if a row takes more than 1.10 times as long.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BAR = 1.10
STEPS = {10: 200, 128: 30}
"""Steps of an epoch by batch size, so that a turn takes some tenths of a second."""


def rows() -> dict[str, Callable[[], float]]:
    """What is timed, by name: each gives the seconds of one turn."""
    import dropout
    import federation
    import step
    import torch
    from torch import nn

    from cl_bench.models import MLP, AlexNetCL

    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, Callable[[], float]] = {}
    for batch, rank in ((10, 100), (10, 650), (128, 400)):
        task, memory = step.Noise(STEPS[batch] * batch), step.bases(rank)
        run = functools.partial(step.ours, task, batch, memory)
        found[f"gpm, batch {batch}, rank {rank}"] = run
        found[f"rogo, batch {batch}, rank {rank}"] = functools.partial(run, rule=step.Relaxed)
        found[f"gpm, batch {batch}, rank {rank}, pack=1"] = functools.partial(run, pack=1)
        if batch == 10:  # commits with a hand-written backward pass can be held to autograd
            kind = {"kind": step.ByAutograd} if hasattr(step, "ByAutograd") else {}
            by_autograd = functools.partial(run, rule=step.Relaxed, **kind)
            found[f"rogo, batch {batch}, rank {rank}, by autograd"] = by_autograd
    for case in federation.CASES:
        found[f"federated round, {case}"] = timed(federation.contenders(case)[0])
    mlp = MLP((1, 28, 28), (400, 400, 400), bias=True, dropout=(0.2, 0.5, 0.5))
    networks = {
        "MLP": (nn.Sequential(mlp, nn.Linear(400, 10)), (1, 28, 28), 50),
        "AlexNet": (nn.Sequential(AlexNetCL((3, 32, 32)), nn.Linear(2048, 10)), (3, 32, 32), 5),
    }
    for name, (network, shape, steps) in networks.items():
        found[f"dropout, {name}"] = timed(dropout.stepper(network, shape), steps)
    return found


def timed(run: Callable[[], object], times: int = 1) -> Callable[[], float]:
    """Seconds of so many calls."""

    def turn() -> float:
        began = time.perf_counter()
        for _ in range(times):
            run()
        return time.perf_counter() - began

    return turn


def serve(tree: str) -> None:
    """Take a turn for every line that comes in."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    sys.path.insert(0, str(Path(tree) / "tests" / "benchmarks"))
    import cl_bench

    assert Path(cl_bench.__file__).is_relative_to(tree), cl_bench.__file__
    known = rows()
    print(json.dumps(list(known)), file=answers, flush=True)
    for line in sys.stdin:
        print(known[json.loads(line)](), file=answers, flush=True)


class Side:
    """A commit's worktree and its process."""

    def __init__(self, commit: str, directory: Path) -> None:
        self.tree = directory / "tree"
        git("worktree", "add", "--detach", "--quiet", str(self.tree), commit)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(self.tree)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(directory / "log").open("w"),
            text=True,
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(self.tree), "OMP_NUM_THREADS": "1"},
        )
        self.rows = json.loads(self._answer())

    def turn(self, row: str) -> float:
        """Seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(row) + "\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.tree} ended: {self.tree.parent / 'log'}")
        return line

    def close(self) -> None:
        """End the process, and remove the worktree."""
        self.process.kill()
        git("worktree", "remove", "--force", str(self.tree))


def git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def fastest(seconds: list[float]) -> float:
    """Mean of the fastest tenth."""
    few = sorted(seconds)[: max(1, len(seconds) // 10)]
    return sum(few) / len(few)


def main() -> int:
    """Returns 0 if every row is within the bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("before", nargs="?")
    parser.add_argument("after", nargs="?", default="HEAD")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--only", default="*", help="pattern of rows")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
        return 0
    directory = Path(tempfile.mkdtemp(prefix="cl_bench-bench-"))
    commits = [git("rev-parse", c) for c in (given.before, given.after)]
    for kind in ("before", "after"):
        (directory / kind).mkdir()
    sides = [Side(c, directory / k) for c, k in zip(commits, ("before", "after"), strict=True)]
    print(f"{commits[0][:9]} and {commits[1][:9]}, {given.turns} turns each, milliseconds a turn")
    missed = False
    try:
        for row in (r for r in sides[0].rows if fnmatchcase(r, given.only)):
            took = [[side.turn(row) for side in sides] for _ in range(given.turns + 1)][1:]
            before, after = (1e3 * fastest(list(side)) for side in zip(*took, strict=True))
            missed |= after > BAR * before
            verdict = "" if after <= BAR * before else "  MISSED"
            print(
                f"{row:32} {before:8.2f} {after:8.2f}  {after / before:.2f}x{verdict}", flush=True
            )
    finally:
        for side in sides:
            side.close()
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
