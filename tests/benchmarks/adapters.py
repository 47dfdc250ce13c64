"""Adapters of one size on MiniLM: what they learn and forget, and how far the network drifts.

    python tests/benchmarks/adapters.py --data FOLDER --runs FOLDER  # goes on where it was
    python tests/benchmarks/adapters.py --runs FOLDER --write docs/results/adapters_minilm.json

FOLDER has ``dbpedia.test.jsonl.gz`` and ``agnews.train.jsonl.gz`` (CL_Benchmark). Three tasks of
four dbpedia classes each, own heads, every adapter with about ``BUDGET`` of the network's
parameters, merged after each task. The rate is the best of ``RATES`` on the first task's
test data with seed 0, and stays. The drift is of what pre-training left: 1 - the mean cosine
of features of news texts, which no task has, before and after all tasks.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import hydra
import torch

from cl_bench.cli.run import run_config
from cl_bench.models import minilm
from cl_bench.tasks.split_text import SplitText

ROOT = Path(__file__).parents[2]
ADAPTERS = ("lora", "dora", "oft", "hra", "psoft", "osf", "svft", "spectral")
BUDGET = "0.5%"
RATES = (3e-4, 3e-3, 3e-2)
SEEDS = (0, 1, 2)
TEXTS = 200
COMMON = (
    "+strategy=finetune",
    "+stream=split_text",
    "stream.train=dbpedia.test*",
    "stream.test=null",
    "stream.text_column=sentence",
    "stream.length=32",
    "stream.scenario=task",
    "stream.classes_per_task=4",
    "stream.train_per_class=160",
    "stream.test_per_class=40",
    "model=minilm",
    "optimizer=adamw",
    "optimizer.weight_decay=0",
    "batch_size=16",
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "eval.tasks=seen",
    "alignment.enabled=false",
    "checkpoint.enabled=false",
    "logger.mode=disabled",
)


def features(network: Any, texts: torch.Tensor) -> torch.Tensor:
    """(n, d) of token ids."""
    network.eval()
    with torch.no_grad():
        return torch.cat([network(part) for part in texts.split(50)])


def one(arguments: argparse.Namespace, adapter: str, rate: float, seed: int, tasks: int) -> dict:
    """A run: the accuracy matrix, seconds, numbers trained, drift; kept in a file."""
    name = f"{adapter}-{rate:g}-{seed}-{tasks}"
    kept = arguments.runs / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    tokenizer = minilm().tokenizer
    words = [
        *COMMON,
        f"adapter={adapter}",
        f"adapter.budget={BUDGET}",
        f"optimizer.lr={rate}",
        f"seed={seed}",
        f"stream.num_tasks={tasks}",
        f"stream.data_dir={arguments.data}",
        f"stream.tokenizer={tokenizer}",
        f"run_dir={arguments.runs / name}-{time.time():.0f}",
    ]
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = hydra.compose("config", words)
    began = time.process_time()
    try:
        result = run_config(cfg, "python -m cl_bench " + " ".join(words), {"adapter": adapter})
    except Exception as error:  # a rate at which the loss is not finite is none
        found: dict[str, Any] = {"failed": str(error).splitlines()[0]}
    else:
        news = SplitText(
            data_dir=str(arguments.data),
            train="agnews.train*",
            test=None,
            text_column="sentence",
            tokenizer=tokenizer,
            length=32,
            num_tasks=1,
            classes_per_task=4,
        )
        texts = news[0].train[torch.arange(TEXTS)]["x"]
        after, before = features(result.learner.backbone.cpu(), texts), features(minilm(), texts)
        member = next(m for m in result.learner.strategy.members if m.needs.adapts)
        found = {
            "matrix": result.matrix.tolist(),
            "drift": 1 - float(torch.cosine_similarity(after, before).mean()),
            "parameters": member.count,
            "size": getattr(member.make(result.learner), member.size),
            "option": member.size,
        }
    found["seconds"] = time.process_time() - began
    kept.write_text(json.dumps(found))
    return found


def rate_of(arguments: argparse.Namespace, adapter: str) -> float:
    """The rate with the best score on the first task."""
    scores = {}
    for rate in RATES:
        found = one(arguments, adapter, rate, 0, 1)
        scores[rate] = -1.0 if "failed" in found else found["matrix"][1][0]
    return max(RATES, key=lambda rate: (scores[rate], -rate))


def row(arguments: argparse.Namespace, adapter: str) -> dict[str, Any]:
    """One adapter's numbers, in percent, mean and standard deviation over seeds."""
    rate = rate_of(arguments, adapter)
    runs = [one(arguments, adapter, rate, seed, 3) for seed in SEEDS]
    if any("failed" in run for run in runs):
        return {"adapter": adapter, "rate": rate, "remark": "a run was not finite"}
    columns = {
        "new": [100 * statistics.mean(run["matrix"][t + 1][t] for t in range(3)) for run in runs],
        "old": [100 * statistics.mean(run["matrix"][3][:2]) for run in runs],
        "drift": [100 * run["drift"] for run in runs],
    }
    found: dict[str, Any] = {
        "adapter": adapter,
        "rate": rate,
        "parameters": runs[0]["parameters"],
        "size": f"{runs[0]['option']}={runs[0]['size']}",
    }
    for name, values in columns.items():
        found[name] = round(statistics.mean(values), 2)
        found[f"{name}_std"] = round(statistics.stdev(values), 2)
    return found


def main() -> int:
    """Run what is missing; with ``--write``, the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--commit", default=None)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    rows = [row(arguments, adapter) for adapter in ADAPTERS]
    if arguments.write:
        whole = {
            "what": __doc__.partition("\n\n")[0],
            "command": "python tests/benchmarks/adapters.py --data FOLDER --runs FOLDER",
            "commit": arguments.commit,
            "seeds": list(SEEDS),
            "machine": "one core",
            "date": time.strftime("%Y-%m-%d"),
            "values": rows,
        }
        arguments.write.write_text(json.dumps(whole, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
