"""Kills runs with SIGKILL at random moments, resumes them, and compares every file they leave.

    python tests/kills.py --kills 100 --seed 0 --jobs 1

Every strategy in conf/strategy takes part, in turn, packed and under Lightning's own optimization.
Three of four moments are uniform over the time that a run learns, the others over the time it takes
to put its results together; now and then the resumed run is killed too. The runs that differ stay
where the last lines say.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from hydra.utils import get_class
from omegaconf import OmegaConf

from runs import differences, final_weights

ROOT = Path(__file__).parent.parent
SMALL = (
    "stream.num_tasks=3",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "checkpoint.every_steps=50",
    "logger.mode=disabled",
)
VARIANTS = (
    (),
    ("pack=1", "optimizer=sgd", "optimizer.momentum=0.9"),
    ("optimizer=adam",),
)
LEARNING = 0.75
"""Share of the kills that fall into learning."""

AGAIN = 0.2
"""Share of the resumed runs that are killed too."""


@dataclass
class Case:
    """A configuration, and what it leaves when nobody interrupts it."""

    overrides: tuple[str, ...]
    whole: Path
    learning: float = 0.0
    seconds: float = 0.0
    made: threading.Lock = field(default_factory=threading.Lock)

    @property
    def name(self):
        return " ".join(o.lstrip("+") for o in self.overrides if o not in SMALL)

    def reference(self):
        """Run it once, and see how long it learns and lives."""
        with self.made:
            if not self.seconds:
                _, self.seconds = start(self.whole, *self.overrides, f"run_dir={self.whole}")
                summary = json.loads((self.whole / "summary.json").read_text())
                self.learning = min(summary["wall_seconds"], self.seconds)


def cases(directory):
    """Every strategy that an image stream can show, with each variant; and a companion."""
    found = []
    for path in sorted((ROOT / "conf" / "strategy").glob("*.yaml")):
        needs = get_class(OmegaConf.load(path)["_target_"]).needs
        if needs.engine == "federated" or (needs.modalities and "image" not in needs.modalities):
            print(f"{path.stem} is left out: it needs another engine or modality", flush=True)
            continue
        stream = "split_digits" if needs.task_id_at_test else "permuted_digits"
        found.append((f"+strategy={path.stem}", f"+stream={stream}"))
    found.append(("+strategy=gpm", "+also=er", "+stream=permuted_digits"))
    return [
        Case((*chosen, *variant, *SMALL), directory / f"whole-{i}")
        for i, (variant, chosen) in enumerate(itertools.product(VARIANTS, found))
    ]


def start(directory, *arguments, kill_after=None):
    """Run the command line; kill it so many seconds after its first file is there.

    Returns:
        Whether it was killed, and how long it lived from that file on.
    """
    log = directory.with_suffix(".log")
    with (
        log.open("a") as output,
        subprocess.Popen(
            [sys.executable, "-m", "cl_bench", *arguments],
            stdout=output,
            stderr=output,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as process,
    ):
        first = directory / ("config.yaml" if arguments[0].startswith("+") else "run.lock")
        while process.poll() is None and not first.exists():
            time.sleep(0.001)
        begun = time.monotonic()
        try:
            process.wait(timeout=kill_after)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        lived = time.monotonic() - begun
    if process.returncode not in (0, -9):
        said = "\n    ".join(log.read_text().splitlines()[-5:])
        raise RuntimeError(f"exit status {process.returncode}; see {log}\n    {said}")
    return process.returncode == -9, lived


def kill(case, directory, seed):
    """Kill one run, resume it, compare. Returns what differs, and what happened."""
    rng = random.Random(seed)
    case.reference()
    for _ in range(10):
        span = (0, case.learning) if rng.random() < LEARNING else (case.learning, case.seconds)
        moment = rng.uniform(*span)
        killed, _ = start(directory, *case.overrides, f"run_dir={directory}", kill_after=moment)
        if killed:
            break
        shutil.rmtree(directory)
    else:
        return ["the run always ended before it could be killed"], ""
    held = sorted(p.stem for p in (directory / "checkpoints").glob("task*.pt"))
    happened = f"killed after {moment:.2f} s with {held[-1] if held else 'no checkpoint'}"
    if not (directory / "config.yaml").exists():
        return [f"nothing to resume {happened}"], happened
    resume = f"resume={directory}"
    if rng.random() < AGAIN:
        again, lived = start(directory, resume, kill_after=rng.uniform(0, case.seconds))
        happened += f", again after {lived:.2f} s" if again else ""
    start(directory, resume)
    found = differences(case.whole, directory)
    if final_weights(case.whole) != final_weights(directory):
        found.append("weights or strategy state of the last checkpoint")
    return found, happened


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if every run ended as if nothing had happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    given = parser.parse_args(arguments)

    directory = Path(tempfile.mkdtemp(prefix="cl_bench-kills-"))
    chosen = [case for case in cases(directory) if given.only in case.name]
    print(f"{given.kills} kills over {len(chosen)} configurations in {directory}", flush=True)
    failed: list[int] = []
    done = itertools.count(1)
    said = threading.Lock()

    def one(number: int) -> None:
        case = chosen[number % len(chosen)]
        run = directory / f"run-{number}"
        begun = time.monotonic()
        try:
            found, happened = kill(case, run, f"{given.seed}-{number}")
        except Exception as error:
            found, happened = [str(error)], ""
        with said:
            result = "identical" if not found else "DIFFERENT"
            took = time.monotonic() - begun
            print(
                f"{next(done)}/{given.kills} {case.name}: {happened}: {result} ({took:.0f} s)",
                flush=True,
            )
            for line in found:
                print(f"    {line}", flush=True)
            if found:
                failed.append(number)
        if not found:
            shutil.rmtree(run)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(one, range(given.kills)))
    print(f"{given.kills - len(failed)} of {given.kills} identical")
    if failed:
        print(f"the others are in {directory}: {', '.join(f'run-{n}' for n in sorted(failed))}")
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
