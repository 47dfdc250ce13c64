"""Kills runs with SIGKILL at random moments, resumes them, and compares every file they leave.

    python tests/kills.py --kills 100 --seed 0 --jobs 1

Every strategy in conf/strategy takes part, in turn, packed and under Lightning's own optimization.
Runs are processes of their own, forked from one that has imported everything.
Three of four moments are uniform over the time that a run learns, the others over the time it takes
to put its results together; now and then the resumed run is killed too. The runs that differ stay
where the last lines say.
"""

import argparse
import itertools
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from helpers.runs import differences, final_weights
from hydra.utils import get_class
from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent
SMALL = (
    "stream.num_tasks=3",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "batch_size=20",
    "checkpoint.every_steps=30",
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

    def reference(self, starters):
        """Run it once, and see how long it learns and lives."""
        with self.made:
            if not self.seconds:
                _, self.seconds = starters.begin(
                    self.whole, *self.overrides, f"run_dir={self.whole}"
                )
                summary = json.loads((self.whole / "summary.json").read_text())
                self.learning = min(summary["wall_seconds"], self.seconds)


def cases(directory):
    """Every strategy that an image stream can show, with each variant; and a companion."""
    found = []
    for path in sorted((ROOT / "conf" / "strategy").glob("*.yaml")):
        needs = get_class(OmegaConf.load(path)["_target_"]).needs
        reads = needs.modalities or {"image"}
        if "local" not in needs.engines or "image" not in reads or "text" in reads:
            print(f"{path.stem} is left out: it needs another engine or modality", flush=True)
            continue
        stream = "split_digits" if needs.task_id_at_test else "permuted_digits"
        found.append((f"+strategy={path.stem}", f"+stream={stream}"))
    found.append(("+strategy=gpm", "+also=er", "+stream=permuted_digits"))
    return [
        Case((*chosen, *variant, *SMALL), directory / f"whole-{i}")
        for i, (variant, chosen) in enumerate(itertools.product(VARIANTS, found))
    ]


class Forks:
    """A process that has imported everything, and forks a child for every command line.

    A child is a process of its own, which SIGKILL ends like any other; only the seconds that
    imports take are spent once. Strings hash differently in two of these with other ``hash_seed``s,
    as they do in two processes that a user starts.
    """

    def __init__(self, hash_seed):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(hash_seed)},
        )

    def start(self, directory, *arguments, kill_after=None):
        """Run the command line; kill it so many seconds after its first file is there.

        Returns:
            Whether it was killed, and how long it lived from that file on.
        """
        log = directory.with_suffix(".log")
        self._send([str(log), *arguments])
        child = int(self.process.stdout.readline())
        first = directory / ("config.yaml" if arguments[0].startswith("+") else "run.lock")
        answer = threading.Event()
        status = []

        def wait():
            status.append(int(self.process.stdout.readline()))
            answer.set()

        threading.Thread(target=wait, daemon=True).start()
        while not answer.is_set() and not first.exists():
            time.sleep(0.001)
        begun = time.monotonic()
        if not answer.wait(kill_after):
            os.kill(child, signal.SIGKILL)
            answer.wait()
        lived = time.monotonic() - begun
        if status[0] not in (0, -signal.SIGKILL):
            said = "\n    ".join(log.read_text().splitlines()[-5:])
            raise RuntimeError(f"exit status {status[0]}; see {log}\n    {said}")
        return status[0] != 0, lived

    def _send(self, words):
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def serve():
    """What a process of :class:`Forks` does until its input ends."""
    import matplotlib.backends.backend_agg  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch._dynamo  # noqa: F401  # optimizers import it when they are first made

    import cl_bench.api  # noqa: F401
    from cl_bench.cli import main

    for line in sys.stdin:
        log, *arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            for descriptor in (1, 2):
                os.dup2(output, descriptor)
            sys.argv = ["cl_bench", *arguments]
            status = 70
            try:
                status = main()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


class Starters:
    """Two of those: a run that is killed in one is resumed in the other."""

    def __init__(self, seed):
        self.both = (Forks(2 * seed + 1), Forks(2 * seed + 2))

    def begin(self, *arguments, **options):
        return self.both[0].start(*arguments, **options)

    def resume(self, *arguments, **options):
        return self.both[1].start(*arguments, **options)

    def close(self):
        for forks in self.both:
            forks.close()


def kill(case, directory, seed, starters):
    """Kill one run, resume it, compare. Returns what differs, and what happened."""
    rng = random.Random(seed)
    case.reference(starters)
    for _ in range(10):
        span = (0, case.learning) if rng.random() < LEARNING else (case.learning, case.seconds)
        moment = rng.uniform(*span)
        killed, _ = starters.begin(
            directory, *case.overrides, f"run_dir={directory}", kill_after=moment
        )
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
    again = False
    if rng.random() < AGAIN:
        again, lived = starters.resume(directory, resume, kill_after=rng.uniform(0, case.seconds))
        happened += f", again after {lived:.2f} s" if again else ""
    starters.begin(directory, resume) if again else starters.resume(directory, resume)
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
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.serve:
        serve()
        return 0

    directory = Path(tempfile.mkdtemp(prefix="cl_bench-kills-"))
    chosen = [case for case in cases(directory) if given.only in case.name]
    print(f"{given.kills} kills over {len(chosen)} configurations in {directory}", flush=True)
    free: queue.SimpleQueue[Starters] = queue.SimpleQueue()
    every = [Starters(seed) for seed in range(given.jobs)]
    for starters in every:
        free.put(starters)
    failed: list[int] = []
    done = itertools.count(1)
    said = threading.Lock()

    def one(number: int) -> None:
        case = chosen[number % len(chosen)]
        run = directory / f"run-{number}"
        begun = time.monotonic()
        try:
            starters = free.get()
            try:
                found, happened = kill(case, run, f"{given.seed}-{number}", starters)
            finally:
                free.put(starters)
        except Exception as error:
            found, happened = [str(error)], ""
        with said:
            result = "identical" if not found else "DIFFERENT"
            took = time.monotonic() - begun
            print(
                f"{next(done)}/{given.kills} {case.name}: {happened}: {result} ({took:.1f} s)",
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
    for starters in every:
        starters.close()
    print(f"{given.kills - len(failed)} of {given.kills} identical")
    if failed:
        print(f"the others are in {directory}: {', '.join(f'run-{n}' for n in sorted(failed))}")
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
