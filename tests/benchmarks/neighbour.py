"""A run of a small network beside busy processes, on two cores: CPU seconds and wall time.

    python tests/benchmarks/neighbour.py --rounds 3

Every round has the same run on a quiet machine and beside two processes that never rest, with
``trainer.threads=auto`` and no variable set, and, to see what that saves, as torch and OpenMP
decide by themselves (threads a core, spinning). The CPU seconds are those of the whole process,
start and imports included. Ends with status 1 where beside costs more than 1.6 times as much.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CORES = 2
MOST = 1.6
RUN = (
    "+strategy=gpm",
    "+stream=permuted_digits",
    "stream.num_tasks=5",
    "trainer.max_epochs=10",
    "trainer.accelerator=cpu",
    "logger.mode=disabled",
)
OURS = ("OMP_", "MKL_", "GOMP_", "KMP_", "OPENBLAS_")
SETTINGS = {
    "auto": {},
    # What cl_bench takes for the user's word, and GNU's OpenMP, which torch has, does not know.
    "by themselves": {"KMP_BLOCKTIME": "200"},
}


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that keep a core busy each."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.2)
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(variables: dict[str, str], arguments: tuple[str, ...]) -> tuple[float, float, float]:
    """CPU seconds and wall seconds of a process, and wall seconds of its run."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(OURS)}
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "cl_bench", *RUN, *arguments, f"run_dir={folder}/run"],
            cwd=ROOT,
            env={**plain, **variables},
            stdout=subprocess.DEVNULL,
        )
        _, status, used = os.wait4(process.pid, 0)
        wall = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"the run ended with status {process.returncode}")
        summary = json.loads((Path(folder) / "run/summary.json").read_text())
    return used.ru_utime + used.ru_stime, wall, summary["wall_seconds"]


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=SETTINGS, help="one of the settings")
    given, arguments = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and the neighbours with it
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    os.sched_setaffinity(0, cores)
    settings = {k: v for k, v in SETTINGS.items() if given.only in (None, k)}
    found: dict[str, dict[int, list[tuple[float, float, float]]]] = {
        name: {0: [], CORES: []} for name in settings
    }
    load = " ".join(f"{x:.2f}" for x in os.getloadavg())
    print(f"cores {cores}, load before {load}, {given.rounds} rounds, medians")
    for _ in range(given.rounds):
        for name, variables in settings.items():
            for count in found[name]:
                with neighbours(count):
                    found[name][count].append(measure(variables, tuple(arguments)))
    print(f"{'threads':14} {'neighbours':>10} {'CPU s':>7} {'wall s':>7} {'run, wall s':>11}")
    ratios = {}
    for name, sides in found.items():
        medians = {n: [statistics.median(x) for x in zip(*sides[n], strict=True)] for n in sides}
        for count, (cpu, wall, run) in medians.items():
            print(f"{name:14} {count:10} {cpu:7.2f} {wall:7.2f} {run:11.2f}")
        ratios[name] = medians[CORES][0] / medians[0][0]
        print(f"{name:14} CPU seconds beside over quiet: {ratios[name]:.2f}", flush=True)
    return int(ratios.get("auto", 0.0) > MOST)


if __name__ == "__main__":
    sys.exit(main())
