"""Whole PMNIST runs through the command line, ours and a naive one in turn: `make bench-pmnist`.

The published protocol (`+experiment=gpm_pmnist` or `rogo_pmnist`) on one thread. The naive
strategies beside this file compute the same update rules the way the published scripts do.

A machine whose speed changes within minutes favours one of two runs that follow each other. With
`--interleave` both runs of a round are under way together and take turns of a few seconds, one
stopped while the other runs; each is charged the seconds in which it was not stopped.
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
from pathlib import Path

HERE = Path(__file__).parent
BARS = {"gpm": 0.35, "rogo": 0.25}
"""At most this share of the naive run's time."""


TURN = 1.0
"""Seconds of our run's turn in interleaved rounds; a naive turn is 1 / bar times as long."""


class Run:
    """One run, process start included.

    Args:
        strategy: whose run it is.
        seed: of the run.
        arguments: of the command line.
        out: where runs go.
    """

    def __init__(self, strategy: str, seed: int, arguments: argparse.Namespace, out: Path) -> None:
        self.directory = out / f"{strategy}-seed{seed}"
        self.command = [
            *(sys.executable, "-m", "cl_bench", "--config-dir", str(HERE / "conf")),
            *(f"+experiment={arguments.method}_pmnist", f"strategy={strategy}", f"seed={seed}"),
            *(f"stream.data_dir={arguments.data_dir}", f"run_dir={self.directory}"),
            *arguments.overrides,
        ]
        self.process: subprocess.Popen[bytes] | None = None
        self.seconds = 0.0

    def go_on(self, limit: float | None = None) -> bool:
        """Run until it ends, or for ``limit`` seconds and then stop; whether it has ended."""
        started = time.perf_counter()
        if self.process is None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
            self.process = subprocess.Popen(
                self.command,
                env=environment,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        else:
            os.killpg(self.process.pid, signal.SIGCONT)
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGSTOP)
            self.seconds += time.perf_counter() - started
            return False
        self.seconds += time.perf_counter() - started
        if code:
            raise SystemExit(f"{self.directory.name} ended with status {code}")
        return True

    def kill(self) -> None:
        """End what has not ended."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def report(self) -> None:
        """Print what it took and reached."""
        summary = json.loads((self.directory / "summary.json").read_text())
        print(
            f"{self.directory.name:18} {self.seconds:7.1f} s  ACC {100 * summary['acc']:.2f}"
            f"  BWT {100 * summary['bwt']:+.2f}",
            flush=True,
        )


def take_turns(naive: Run, ours: Run, bar: float) -> None:
    """Let both run to their ends, one at a time; at the bar they would end together."""
    waiting = [(naive, TURN / bar), (ours, TURN)]
    while waiting:
        waiting = [(run, turn) for run, turn in waiting if not run.go_on(turn)]


def main() -> None:
    """Alternate the two and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", required=True, help="folder with MNIST's parquet files")
    parser.add_argument("--method", choices=sorted(BARS), default="gpm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="a round for each")
    parser.add_argument("--interleave", action="store_true", help="both at once, in turns")
    parser.add_argument("--out", type=Path, help="keep the runs here")
    parser.add_argument("overrides", nargs="*", help="join both command lines")
    arguments = parser.parse_args()
    arguments.data_dir = Path(arguments.data_dir).resolve()
    bar = BARS[arguments.method]
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch)
        ratios = []
        for seed in arguments.seeds:
            names = f"naive_{arguments.method}", arguments.method
            naive, ours = (Run(name, seed, arguments, out) for name in names)
            try:
                if arguments.interleave:
                    take_turns(naive, ours, bar)
                else:
                    naive.go_on()
                    ours.go_on()
            finally:
                naive.kill()
                ours.kill()
            naive.report()
            ours.report()
            ratios.append(ours.seconds / naive.seconds)
            print(f"{'':18} {ratios[-1]:7.3f}x", flush=True)
    middle = statistics.median(ratios)
    verdict = "met" if middle <= bar else "MISSED"
    print(f"median of {len(ratios)}: {middle:.3f}x of the naive run; bar {bar}x: {verdict}")


if __name__ == "__main__":
    main()
