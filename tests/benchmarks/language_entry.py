"""Whether the tasks of t5_cl_small can be learned: each alone, against its majority class.

A task may stay in the stream only if it beats the share of its commonest answer by 15 points on
every seed. Through the stream's own settings, one process: minutes a task and seed.
"""

import argparse
import tempfile
import time
from pathlib import Path

from cl_bench import run

BAR = 0.15
TASKS = ("dbpedia", "agnews", "amazon", "yelp")


def main() -> None:
    """Print a line for every task and seed, then the verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", required=True, help="folder with CL_Benchmark's files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("overrides", nargs="*", help="join the command line")
    arguments = parser.parse_args()
    data = Path(arguments.data_dir).resolve()
    refused = set()
    with tempfile.TemporaryDirectory() as scratch:
        for task in arguments.tasks:
            for seed in arguments.seeds:
                started = time.process_time()
                result = run(
                    "t5_cl_small",
                    "finetune",
                    overrides=[
                        f"stream.data_dir={data}",
                        f"stream.tasks=[{task}]",
                        *("logger.mode=disabled", "alignment.enabled=false"),
                        *arguments.overrides,
                    ],
                    run_dir=Path(scratch) / f"{task}-{seed}",
                    seed=seed,
                )
                score = float(result.matrix[1, 0])
                stream = result.learner.prompts  # type: ignore[attr-defined]
                majority = stream.tasks[0].facts["majority"]
                gain = score - majority
                print(
                    f"{task:8} seed {seed}  {100 * score:5.1f}  majority {100 * majority:5.1f}"
                    f"  {100 * gain:+5.1f}  {time.process_time() - started:4.0f} s of CPU",
                    flush=True,
                )
                if gain < BAR:
                    refused.add(task)
    kept = [task for task in arguments.tasks if task not in refused]
    print(f"enter: {', '.join(kept) or 'none'}; refused: {', '.join(sorted(refused)) or 'none'}")


if __name__ == "__main__":
    main()
