"""Do some optimizers forget less at the same accuracy on what is new? The study's runs and table.

    python tests/benchmarks/optimizer_study.py --runs build/optimizer_study
    python tests/benchmarks/optimizer_study.py --runs build/optimizer_study --results docs/results

The first learns what is missing of optimizers x strategies x initial weights x rates x seeds, in
one process, and can be stopped and started at any time. The second writes the table's data. Initial
weights ``adamw`` have learned the upright digits with AdamW before the first task.
"""

import argparse
import datetime
import itertools
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from cl_bench.cli.compose import composed
from cl_bench.cli.run import run_config

RATES = {
    "sgd": (0.01, 0.03, 0.1, 0.3),
    "adamw": (3e-4, 1e-3, 3e-3, 1e-2),
    "muon": (3e-3, 1e-2, 3e-2, 1e-1),
    "normuon": (1e-3, 3e-3, 1e-2, 3e-2),
    "soap": (3e-4, 1e-3, 3e-3, 1e-2),
}
STRATEGIES = ("finetune", "freeze", "gpm", "rogo", "er")
STARTS = ("scratch", "adamw")
SEEDS = (0, 1, 2)
SCORES = ("acc", "learning_accuracy", "forgetting")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--commit", help="of the code that learned them; by default of this")
    arguments = parser.parse_args()
    if arguments.results is None:
        for case in cases():
            learn(arguments.runs, *case)
        return
    write(arguments.results / "optimizer_study.json", arguments.runs, arguments.commit or head())


def cases() -> Iterator[tuple[str, str, str, float, int]]:
    """Seeds last, so that whatever is there when it is stopped can be compared."""
    for seed, start, strategy in itertools.product(SEEDS, STARTS, STRATEGIES):
        for optimizer, rates in RATES.items():
            for rate in rates:
                yield start, strategy, optimizer, rate, seed


def directory(
    runs: Path, start: str, strategy: str, optimizer: str, rate: float, seed: int
) -> Path:
    return runs / start / f"{strategy}-{optimizer}-{rate:g}-{seed}"


def learn(runs: Path, start: str, strategy: str, optimizer: str, rate: float, seed: int) -> None:
    """One run, unless it is there."""
    where = directory(runs, start, strategy, optimizer, rate, seed)
    if (where / "summary.json").exists():
        return
    given = {} if start == "scratch" else {"model": pretrained(runs, seed)}
    words = [f"strategy={strategy}", f"optimizer={optimizer}", f"optimizer.lr={rate}"]
    words += ["optimizer.weight_decay=0.0"] if optimizer == "adamw" else []
    begin(words, seed, where, given)


def pretrained(runs: Path, seed: int) -> torch.nn.Module:
    """The network that has learned the upright digits with AdamW, without its head."""
    kept = runs / f"pretrained-{seed}.pt"
    if not kept.exists():
        words = ["optimizer=adamw", "optimizer.weight_decay=0.0", "stream.num_tasks=1"]
        result = begin(words, seed, runs / f"pretraining-{seed}", {})
        torch.save(result.learner.backbone, kept)
    network: torch.nn.Module = torch.load(kept, weights_only=False)
    return network


def begin(words: list[str], seed: int, where: Path, given: dict[str, Any]) -> Any:
    words = ["+experiment=optimizer_study", f"seed={seed}", *words]
    if where.exists():  # begun, and stopped
        where.rename(where.with_name(f"{where.name}.stopped-{datetime.datetime.now():%H%M%S}"))
    cfg, choices = composed(words)
    cfg.run_dir = str(where)
    return run_config(cfg, f"python -m cl_bench {' '.join(words)}", choices, given=given)


def head() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()


def read(runs: Path, *case: Any) -> dict[str, float] | None:
    path = directory(runs, *case) / "summary.json"
    if not path.exists():
        return None
    summary = json.loads(path.read_text())
    return {score: 100 * summary[score] for score in SCORES}


def measured(runs: Path) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Means over seeds at every rate of an optimizer, by start, strategy and optimizer."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for start, strategy, (optimizer, rates) in itertools.product(STARTS, STRATEGIES, RATES.items()):
        for rate in rates:
            rows = [read(runs, start, strategy, optimizer, rate, seed) for seed in SEEDS]
            there = [row for row in rows if row is not None]
            if there:
                row: dict[str, Any] = {"rate": rate, "seeds": len(there)}
                for score in SCORES:
                    values = [one[score] for one in there]
                    row[score] = mean(values)
                    row[f"{score}_std"] = stdev(values) if len(values) > 1 else 0.0
                found.setdefault((start, strategy, optimizer), []).append(row)
    return found


def write(path: Path, runs: Path, commit: str) -> None:
    """Of every optimizer the rate at which new tasks are learned as well as by the others.

    The target of a strategy and a start is the lowest of the optimizers' best learning accuracies.
    """
    curves, rows = measured(runs), []
    for start, strategy in itertools.product(STARTS, STRATEGIES):
        those = {o: curves[start, strategy, o] for o in RATES if (start, strategy, o) in curves}
        if not those:
            continue
        target = min(max(row["learning_accuracy"] for row in curve) for curve in those.values())
        for optimizer, curve in those.items():
            row = min(curve, key=lambda r: abs(r["learning_accuracy"] - target))
            rows.append(
                {"start": start, "strategy": strategy, "optimizer": optimizer, "target": target}
                | {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            )
    whole = {
        "what": "five rotations of the digits, MLP 100-100; of four rates of each optimizer the "
        "one whose learning accuracy is nearest to the best that all optimizers reach with that "
        "strategy and start; percent, mean and standard deviation over seeds",
        "command": "python tests/benchmarks/optimizer_study.py --runs build/optimizer_study",
        "commit": commit,
        "seeds": list(SEEDS),
        "machine": f"2 shared cores, one thread, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "date": f"{datetime.date.today()}",
        "values": rows,
    }
    path.write_text(json.dumps(whole, indent=1) + "\n")
    print(f"{path}: {len(rows)} rows", file=sys.stderr)


if __name__ == "__main__":
    main()
