"""Whole PMNIST runs through the command line, ours and a naive one in turn: `make bench-pmnist`.

The published protocol (`+experiment=gpm_pmnist` or `rogo_pmnist`) on one thread. The naive
strategies beside this file compute the same update rules the way the published scripts do.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
BARS = {"gpm": 0.35, "rogo": 0.25}
"""At most this share of the naive run's time."""


def run(strategy: list[str], seed: int, arguments: argparse.Namespace, out: Path) -> float:
    """Seconds of one run, process start included; prints what it reached."""
    directory = out / f"{strategy[-1].split('=')[-1]}-seed{seed}"
    command = [
        *(sys.executable, "-m", "cl_bench", "--config-dir", str(HERE / "conf")),
        f"+experiment={arguments.method}_pmnist",
        *strategy,
        *(f"seed={seed}", f"stream.data_dir={arguments.data_dir}", f"run_dir={directory}"),
        *arguments.overrides,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    started = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    summary = json.loads((directory / "summary.json").read_text())
    print(
        f"{directory.name:18} {seconds:7.1f} s  ACC {100 * summary['acc']:.2f}"
        f"  BWT {100 * summary['bwt']:+.2f}",
        flush=True,
    )
    return seconds


def main() -> None:
    """Alternate the two and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", required=True, help="folder with MNIST's parquet files")
    parser.add_argument("--method", choices=sorted(BARS), default="gpm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="a round for each")
    parser.add_argument("--out", type=Path, help="keep the runs here")
    parser.add_argument("overrides", nargs="*", help="join both command lines")
    arguments = parser.parse_args()
    arguments.data_dir = Path(arguments.data_dir).resolve()
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch)
        ratios = []
        for seed in arguments.seeds:
            naive = run([f"strategy=naive_{arguments.method}"], seed, arguments, out)
            ratios.append(run([f"strategy={arguments.method}"], seed, arguments, out) / naive)
            print(f"{'':18} {ratios[-1]:7.3f}x", flush=True)
    middle = statistics.median(ratios)
    bar = BARS[arguments.method]
    verdict = "met" if middle <= bar else "MISSED"
    print(f"median of {len(ratios)}: {middle:.3f}x of the naive run; bar {bar}x: {verdict}")


if __name__ == "__main__":
    main()
