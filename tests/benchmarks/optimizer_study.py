"""Do some optimizers forget less at the same accuracy on what is new? The study's runs and table.

    python tests/benchmarks/optimizer_study.py --runs build/optimizer_study --mnist /path/to/mnist
    python tests/benchmarks/optimizer_study.py --runs build/optimizer_study --results docs/results

The first learns what is missing of images x optimizers x strategies x initial weights x rates x
seeds, in one process, and can be stopped and started at any time; without MNIST's folder, the
digits alone. The second writes the table's data. Initial weights ``adamw`` have learned the upright
digits, or MNIST as it is, with AdamW before the first task.
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

import pyarrow.parquet as pq
import torch

from cl_bench.cli.compose import composed
from cl_bench.cli.run import run_config

RATES = {
    "sgd": (0.01, 0.03, 0.1, 0.3),
    "adamw": (3e-4, 1e-3, 3e-3, 1e-2),
    "muon": (3e-3, 1e-2, 3e-2, 1e-1),
    "normuon": (1e-3, 3e-3, 1e-2, 3e-2),
    "soap": (3e-4, 1e-3, 3e-3, 1e-2),
    "spectral": (3e-3, 1e-2, 3e-2, 1e-1),
}
OPTIMIZERS = ("sgd", "adamw", "muon", "normuon", "soap")
STRATEGIES = ("finetune", "freeze", "gpm", "rogo", "er")
STARTS = ("scratch", "adamw", "pmnist_scratch", "pmnist_adamw")
IMAGES = 2000
"""MNIST's first so many, to learn and to test: about as many steps as the digits take."""
SEEDS = (0, 1, 2)
SCORES = ("acc", "learning_accuracy", "forgetting")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--mnist", type=Path, help="folder with train*.parquet and test*.parquet")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--commit", help="of the code that learned them; by default of this")
    arguments = parser.parse_args()
    if arguments.results is None:
        if arguments.mnist is not None:
            fewer(arguments.mnist, arguments.runs / "mnist")
        for case in cases():
            if arguments.mnist is not None or not is_pmnist(case[0]):
                learn(arguments.runs, *case)
        return
    write(arguments.results / "optimizer_study.json", arguments.runs, arguments.commit or head())


def cases() -> Iterator[tuple[str, str, str, float, int]]:
    """Seeds last, so that whatever is there when it is stopped can be compared."""
    for seed, strategy in itertools.product(SEEDS, ("gpm", "gpm_both")):
        for rate in RATES["spectral"]:
            yield "scratch", strategy, "spectral", rate, seed
    for images in (STARTS[:2], STARTS[2:]):
        for seed, start, strategy in itertools.product(SEEDS, images, STRATEGIES):
            for optimizer in OPTIMIZERS:
                for rate in RATES[optimizer]:
                    yield start, strategy, optimizer, rate, seed


def is_pmnist(start: str) -> bool:
    return start.startswith("pmnist_")


def fewer(mnist: Path, to: Path) -> None:
    """Write the first images of both sides."""
    to.mkdir(parents=True, exist_ok=True)
    for side in ("train", "test"):
        (file,) = mnist.glob(f"{side}*.parquet")
        pq.write_table(pq.read_table(file).slice(0, IMAGES), to / f"{side}.parquet")


def stream_of(runs: Path, start: str) -> list[str]:
    """The overrides that name it."""
    if not is_pmnist(start):
        return []
    return [
        *("stream=pmnist", "stream.num_tasks=5", f"stream.data_dir={runs}/mnist"),
        *("pack=64", "batch_size=32", "trainer.max_epochs=4"),
    ]


def directory(
    runs: Path, start: str, strategy: str, optimizer: str, rate: float, seed: int
) -> Path:
    return runs / start / f"{strategy}-{optimizer}-{rate:g}-{seed}"


def learn(runs: Path, start: str, strategy: str, optimizer: str, rate: float, seed: int) -> None:
    """One run, unless it is there."""
    where = directory(runs, start, strategy, optimizer, rate, seed)
    if (where / "summary.json").exists():
        return
    given = {"model": pretrained(runs, start, seed)} if start.endswith("adamw") else {}
    words = stream_of(runs, start)
    words += [f"strategy={strategy}", f"optimizer={optimizer}", f"optimizer.lr={rate}"]
    if strategy == "gpm_both":  # gradients and the step: the answer that Muon-OGD looks for
        words[words.index(f"strategy={strategy}")] = "strategy=gpm"
        words.append("strategy.project=both")
    words += ["optimizer.weight_decay=0.0"] if optimizer == "adamw" else []
    begin(words, seed, where, given)


def pretrained(runs: Path, start: str, seed: int) -> torch.nn.Module:
    """The network that has learned the images as they are with AdamW, without its head."""
    name = f"{'pmnist-' if is_pmnist(start) else ''}{seed}"
    kept = runs / f"pretrained-{name}.pt"
    if not kept.exists():
        words = ["optimizer=adamw", "optimizer.weight_decay=0.0", *stream_of(runs, start)]
        words += ["stream.num_tasks=1"]
        words += ["stream.identity_first=true"] if is_pmnist(start) else []
        result = begin(words, seed, runs / f"pretraining-{name}", {})
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


def at_target(curve: list[dict[str, float]], target: float) -> float:
    """Forgetting where learning accuracy first reaches the target, on the line between two rates.

    Args:
        curve: scores at rising rates.
        target: learning accuracy; if no rate reaches it, the best one counts.
    """
    best = max(range(len(curve)), key=lambda i: curve[i]["learning_accuracy"])
    for low, high in itertools.pairwise(curve[: best + 1]):
        reached, before = high["learning_accuracy"], low["learning_accuracy"]
        if before < target <= reached:
            share = (target - before) / (reached - before)
            return low["forgetting"] + share * (high["forgetting"] - low["forgetting"])
    return curve[0 if curve[0]["learning_accuracy"] >= target else best]["forgetting"]


def compared(
    runs: Path, start: str, strategies: dict[str, str], optimizers: dict[str, str]
) -> dict[str, Any] | None:
    """Forgetting of several columns at the learning accuracy that all of them reach.

    Args:
        runs: where they are.
        start: initial weights.
        strategies: by column.
        optimizers: by column.
    """
    curves: dict[str, list[list[dict[str, float]]]] = {}
    for column, optimizer in optimizers.items():
        for seed in SEEDS:
            cases = [(start, strategies[column], optimizer, r, seed) for r in RATES[optimizer]]
            curve = [read(runs, *case) for case in cases]
            if None not in curve:
                curves.setdefault(column, []).append([row for row in curve if row is not None])
    if len(curves) < len(optimizers):
        return None
    seeds = min(map(len, curves.values()))
    best = [
        mean(max(row["learning_accuracy"] for row in curve) for curve in those[:seeds])
        for those in curves.values()
    ]
    row: dict[str, Any] = {"start": start, "target": round(min(best), 2), "seeds": seeds}
    for column, those in curves.items():
        values = [at_target(curve, min(best)) for curve in those[:seeds]]
        row[column] = round(mean(values), 2)
        if seeds > 1:
            row[f"{column}_std"] = round(stdev(values), 2)
    return row


def write(path: Path, runs: Path, commit: str) -> None:
    """Forgetting at the highest learning accuracy that all optimizers reach."""
    rows = []
    for start, strategy in itertools.product(STARTS, STRATEGIES):
        row = compared(runs, start, dict.fromkeys(OPTIMIZERS, strategy), {o: o for o in OPTIMIZERS})
        if row is not None:
            images = "permuted MNIST" if is_pmnist(start) else "digits"
            row["start"] = start.removeprefix("pmnist_")
            rows.append({"table": "study", "images": images, "strategy": strategy, **row})
    columns = {"step": "gpm", "both": "gpm_both"}
    row = compared(runs, "scratch", columns, dict.fromkeys(columns, "spectral"))
    rows += [] if row is None else [{"table": "ogd", **row}]
    whole = {
        "what": "five rotations of the digits, or five permutations of MNIST's first "
        f"{IMAGES} images; MLP 100-100; forgetting (percent, mean and standard deviation over "
        "seeds) at the highest learning accuracy that all optimizers reach with that strategy and "
        "start (target), between two of four rates of each",
        "command": "python tests/benchmarks/optimizer_study.py --runs build/optimizer_study "
        "--mnist /path/to/mnist",
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
