"""Low-rank pairs of four clients on MiniLM: fed_lora, ffa_lora, fedsvd.

    PYTHONPATH=/where/make/backbones/puts/them python tests/benchmarks/fedsvd.py build/fedsvd.jsonl

The texts are the first paragraphs of the docstrings of packages that are installed anyway, the
label is the package. A line for each method and seed is added to the file; those that are there are
not run again.
"""

import argparse
import functools
import importlib
import inspect
import json
import pkgutil
import tempfile
import time
from pathlib import Path

import torch
from torch.optim import SGD

from cl_bench.contracts import generator
from cl_bench.experiment import LoopSettings
from cl_bench.federation import FederatedEngine, Federation
from cl_bench.learners import Classifier
from cl_bench.models import minilm
from cl_bench.strategies.federated.fed_lora import FedLoRA
from cl_bench.strategies.federated.fedsvd import FedSVD
from cl_bench.strategies.federated.ffa_lora import FFALoRA
from cl_bench.tasks.split_text import SplitText

PACKAGES = ("numpy", "scipy", "pandas", "sklearn")
PER_CLASS, LENGTH, CLIENTS, ROUNDS, BATCH, RATE = 100, 32, 4, 20, 16, 0.05
OPTIONS = {"rank": 8, "alpha": 8.0, "targets": ["query", "value"]}
METHODS = {"fed_lora": FedLoRA, "ffa_lora": FFALoRA, "fedsvd": FedSVD}


class Silent:
    """Keeps and shows nothing."""

    def __init__(self):
        self.rounds = []

    def round(self, **told):
        self.rounds.append(told["train_loss"])

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def docstrings(package):
    """First paragraphs of the package's public functions and classes, in a fixed order."""
    found = {}
    root = importlib.import_module(package)
    names = sorted(m.name for m in pkgutil.iter_modules(root.__path__) if m.name[0] != "_")
    for module in [
        root,
        *(
            quietly(importlib.import_module, f"{package}.{name}")
            for name in names
            if name != "tests"
        ),
    ]:
        for name in sorted(getattr(module, "__all__", None) or dir(module or object)):
            made = quietly(getattr, module, name, None)
            if callable(made) and (said := inspect.getdoc(made)):
                text = " ".join(said.split("\n\n")[0].split())
                if 20 < len(text) < 400 and package not in text.lower():
                    found[text] = None
    return list(found)


def quietly(function, *arguments):
    """What it gives; None where a module is not to be had."""
    try:
        return function(*arguments)
    except Exception:
        return None


def stream(folder, tokenizer):
    with (folder / "train.jsonl").open("w") as file:
        for label in PACKAGES:
            texts = docstrings(label)
            order = torch.randperm(len(texts), generator=generator(0, "texts")).tolist()
            for i in order[: PER_CLASS + 50]:
                file.write(json.dumps({"text": texts[i], "label": label}) + "\n")
    return SplitText(
        data_dir=str(folder), test=None, test_fraction=1 / 3, tokenizer=tokenizer, length=LENGTH,
        num_tasks=1, classes_per_task=None, scenario="domain", validation_fraction=0.0,
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    done = set()
    if given.file.exists():
        done = {tuple(json.loads(line)["key"]) for line in given.file.read_text().splitlines()}
    with tempfile.TemporaryDirectory() as folder:
        made = stream(Path(folder), minilm().tokenizer)
        task = made[0]
        print(len(task.train), len(task.test), task.train.tensors["x"].shape, flush=True)
        federation = Federation(
            clients=CLIENTS, per_round=CLIENTS, rounds=given.rounds, partition="dirichlet",
            alpha=0.5, statistics="sampled",
        )  # fmt: skip
        for seed in given.seeds:
            for name, method in METHODS.items():
                if (name, seed) in done:
                    continue
                began = time.process_time()
                torch.manual_seed(seed)
                learner = Classifier(
                    made, minilm(), functools.partial(SGD, lr=RATE), BATCH, seed, head_bias=True
                )
                strategy, record = method(**OPTIONS), Silent()
                engine = FederatedEngine(
                    learner, strategy, None, LoopSettings(seed, BATCH), None, record, Silent(),
                    federation=federation,
                )  # fmt: skip
                before = engine.evaluate([task], 100, None)[task.name]
                engine.learn(task, strategy.plan(made, 0))
                row = {
                    "key": [name, seed],
                    "before": before,
                    "accuracy": engine.evaluate([task], 100, None)[task.name],
                    "losses": record.rounds,
                    "cpu_seconds": time.process_time() - began,
                }
                with given.file.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)


if __name__ == "__main__":
    main()
