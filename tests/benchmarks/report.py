"""Time and memory of a report of many runs: tables, page, LaTeX.

    python tests/benchmarks/report.py [--runs 1000]

Runs are made without learning: 20 strategies, ten tasks, a configuration as a run has it.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from cl_bench.cli.folders import conf_directory
from cl_bench.tracking import open_record

STRATEGIES, TASKS = 20, 10
SECONDS, MEGABYTES = 20.0, 500.0


def make(folder: Path, runs: int) -> None:
    """Finished runs of every strategy under as many seeds as it takes."""
    os.fsync = lambda descriptor: None  # nothing here has to outlive a power cut
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        config = compose("config", ["+strategy=gpm", "+stream=permuted_digits", "run_dir=runs"])
    names = [f"permutation {t + 1}" for t in range(TASKS)]
    for number in range(runs):
        seed, place = divmod(number, STRATEGIES)
        strategy = f"method_{place:02}"
        config.seed = seed
        config.strategy._target_ = f"cl_bench.strategies.{strategy}"
        draw = np.random.default_rng([seed, place])
        facts = {"stream": "permuted_digits", "strategy": strategy, "seed": seed}
        with open_record(
            folder / strategy / str(seed),
            names,
            task_id_known=False,
            facts=facts,
            config=OmegaConf.to_yaml(config, resolve=True),
            command=f"python -m cl_bench +strategy={strategy} seed={seed}",
        ) as record:
            for row in range(TASKS + 1):
                scores = np.clip(draw.normal(0.5 + place / 50, 0.1, TASKS), 0, 1)
                record.row(row, row - 1 if row else None, dict(zip(names, scores, strict=True)), 1)
            layers = {f"fc{k}": {"rank": k, "capacity_left": 0.5} for k in range(3)}
            for task in range(TASKS):
                record.layers(task, layers)
            record.finish("completed", optimizer_steps=100, strategy_bytes=2048)


def main() -> int:
    """Print what a report costs; status 1 where it is more than it may be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=1000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), given.runs)
        begun = time.perf_counter()
        command = [sys.executable, "-m", "cl_bench.report", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - begun
        page = (Path(folder) / "report.html").stat().st_size / 1e6
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {
        "runs": given.runs,
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "wall_seconds": round(wall, 1),
        "peak_megabytes": round(used.ru_maxrss / 1024),
        "page_megabytes": round(page, 2),
    }
    print(json.dumps(found))
    return int(found["cpu_seconds"] > SECONDS or found["peak_megabytes"] > MEGABYTES)


if __name__ == "__main__":
    sys.exit(main())
