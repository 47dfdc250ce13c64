"""Eight tasks merged, or learned in turn, by a small vision transformer that was trained before.

    python tests/benchmarks/merging_vit.py /path/to/cifar100 --to build/merging_vit

36 classes of CIFAR-100 pre-train theta_0, the other 64 make eight tasks of 8, a head each and the
task id known, in ``--orders`` random orders. What training gives from theta_0 is kept, so that all
rules of one order merge the same eight models: for them a task has no epochs and begins with
its weights. One thread. What is finished is not done again; a row that was killed begins anew.
"""

import argparse
import functools
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Adam, AdamW

from cl_bench import run
from cl_bench.contracts import Plan, Scenario, Stream
from cl_bench.models import ViT
from cl_bench.strategies.merging.merge import Merge
from cl_bench.tasks.split_cifar100 import SplitCIFAR100
from cl_bench.tasks.tensors import from_tensors
from cl_bench.tracking import read_matrix

BASE, TASKS, CLASSES = 36, 8, 8
RULES = (
    *("average", "task_arithmetic", "ties", "dare", "magmax"),
    *("tsv_m", "iso_c", "iso_cts", "opcm", "dop"),
)
TURN = ("finetune", "gpm", "adaptive_svd", "joint")
PAIRS = ("strategy.train=pairs", "strategy.pair_targets=[linear]")
OTHERS = {
    "ota": ("merge", "strategy.rule=ota"),
    "fw_merging": ("fw_merging",),
    "magmax, from the last model": ("merge", "strategy.rule=magmax", "strategy.init=last"),
    "average, pairs": ("merge", "strategy.rule=average", *PAIRS),
    "core_space of ties, pairs": (
        *("merge", "strategy.rule=core_space", "strategy.inner=ties", *PAIRS),
    ),
    "average, pairs by OSRM": (
        *("merge", "strategy.rule=average", *PAIRS, "strategy.pair_start=osrm_moments"),
    ),
}
"""Rows that train models of their own."""


class Shared(Merge):
    """Merges models that were trained from theta_0 once; trains and keeps those that are missing.

    Args:
        models: folder of the models, one file a task.
        rule: as in :class:`Merge`.
    """

    def __init__(self, models: str, rule: str) -> None:
        super().__init__(rule)  # type: ignore[arg-type]
        self.models = Path(models)

    def _file(self, t: int) -> Path:
        return self.models / f"task{t}.safetensors"

    def plan(self, stream: Stream, t: int) -> Plan:
        """A task without epochs where its model is there."""
        if self._file(t).exists():
            return Plan(stream[t].train, epochs=0, start=load_file(self._file(t)))
        return super().plan(stream, t)

    def setup(self, learner, task) -> None:  # type: ignore[no-untyped-def]
        """Theta_0 is what was there before the first task's model."""
        super().setup(learner, task)
        if task.index == 0:
            before = load_file(self.models / "theta_0.safetensors")
            self.base = {name: before[name] for name in self.base}

    def consolidate(self, learner, task, stats) -> None:  # type: ignore[no-untyped-def]
        """Keep the model."""
        if not self._file(task.index).exists():
            names = (*self.base, f"heads.{task.head}.weight")
            found = {name: learner.weights()[name].clone() for name in names}
            save_file(found, self._file(task.index).with_suffix(".tmp"))
            self._file(task.index).with_suffix(".tmp").rename(self._file(task.index))
        super().consolidate(learner, task, stats)


def vit(patch: int) -> nn.Module:
    """The network with random weights."""
    torch.manual_seed(0)
    return ViT((3, 32, 32), patch=patch, depth=4, width=96, heads=4)


def images(data: str, train: int, test: int) -> dict[str, list[Tensor]]:
    """Training and test images of each class."""
    stream = SplitCIFAR100(
        100,
        scenario="class",
        validation_fraction=0.0,
        train_per_class=train,
        test_per_class=test,
        data_dir=data,
    )
    found: dict[str, list[Tensor]] = {"train": [], "test": []}
    for task in stream:
        for split, kept in found.items():
            part = getattr(task, split)
            kept.append(part[torch.arange(len(part))]["x"])
    return found


def pretrained(to: Path, x: list[Tensor], patch: int, epochs: int) -> dict[str, Tensor]:
    """Theta_0: by cross-entropy on the first classes, mirrored at random, AdamW 1e-3, cosine."""
    file = to / "theta_0.safetensors"
    if file.exists():
        return load_file(file)
    network, rng = vit(patch), torch.Generator().manual_seed(0)
    model = nn.Sequential(network, nn.Linear(96, len(x)))
    inputs, y = torch.cat(x), torch.arange(len(x)).repeat_interleave(len(x[0]))
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = epochs * (len(y) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        hits = 0
        for chosen in torch.randperm(len(y), generator=rng)[: len(y) // 64 * 64].split(64):
            batch = inputs[chosen]
            mirrored = torch.rand(len(chosen), generator=rng) < 0.5
            batch[mirrored] = batch[mirrored].flip(-1)
            out = model(batch)
            hits += int((out.argmax(1) == y[chosen]).sum())
            optimizer.zero_grad()
            F.cross_entropy(out, y[chosen]).backward()
            optimizer.step()
            schedule.step()
        print(f"pre-training: epoch {epoch + 1} of {epochs}, {hits / len(y):.3f} right", flush=True)
    weights = {f"backbone.{n}": w.detach().clone() for n, w in network.state_dict().items()}
    save_file(weights, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").rename(file)
    return weights


def stream_of(
    x: dict[str, list[Tensor]],
    order: int,
    base: int,
    tasks: int,
    train: int,
    scenario: Scenario = "task",
) -> Stream:
    """The other classes in a random order, as many a task as fit."""
    rng = torch.Generator().manual_seed(order)
    classes = base + torch.randperm(len(x["train"]) - base, generator=rng)
    made = []
    for own in classes.chunk(tasks):
        parts = {}
        for split, count in (("train", train), ("test", None)):
            images_ = [x[split][int(c)][:count] for c in own]
            y = torch.arange(len(own)).repeat_interleave(len(images_[0]))
            parts[split] = (torch.cat(images_), y)
        made.append(parts)
    return from_tensors(made, scenario, labels="task", name="cifar100_after_36_classes")


def rows(folder: Path) -> dict[str, tuple[object, tuple[str, ...]]]:
    """Strategies by the names of their rows, with their settings."""
    found: dict[str, tuple[object, tuple[str, ...]]] = {}
    for rule in RULES:
        found[rule] = (Shared(str(folder / "models"), rule), ())
    for name in TURN:
        found[name] = (name, ())
    for name, (strategy, *settings) in OTHERS.items():
        found[name] = (strategy, tuple(settings))
    return found


def numbers(directory: Path) -> dict[str, float]:
    """ACC, BWT and the score right after each task, in percent."""
    _, matrix = read_matrix(directory)
    R = 100 * np.asarray(matrix)
    count = R.shape[1]
    after = np.array([R[t + 1, t] for t in range(count)])
    return {
        "acc": float(R[count].mean()),
        "bwt": float((R[count] - after)[:-1].mean()),
        "learning_accuracy": float(after.mean()),
    }


def main() -> None:
    """Train, merge, tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("data")
    parser.add_argument("--to", type=Path, default=Path("build/merging_vit"))
    parser.add_argument("--orders", type=int, default=2)
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--pretraining", type=int, default=15, help="epochs")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--train", type=int, default=100, help="images a class of each task")
    parser.add_argument("--base", type=int, default=300, help="images a class of pre-training")
    parser.add_argument("--test", type=int, default=50, help="images a class")
    parser.add_argument("--only", nargs="*", help="rows")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.to.mkdir(parents=True, exist_ok=True)
    x = images(asked.data, max(asked.base, asked.train), asked.test)
    first = [part[: asked.base] for part in x["train"][:BASE]]
    theta_0 = pretrained(asked.to, first, asked.patch, asked.pretraining)
    network = vit(asked.patch)
    network.load_state_dict({n.removeprefix("backbone."): w for n, w in theta_0.items()})
    found: dict[str, dict[int, dict[str, float]]] = {}
    for order in range(asked.orders):
        folder = asked.to / f"order{order}"
        (folder / "models").mkdir(parents=True, exist_ok=True)
        save_file(theta_0, folder / "models" / "theta_0.safetensors")
        stream = stream_of(x, order, BASE, TASKS, asked.train)
        for name, (strategy, settings) in rows(folder).items():
            if asked.only and name not in asked.only:
                continue
            directory = folder / name.replace(", ", "_").replace(" ", "_")
            if not (directory / "summary.json").exists():
                began = time.process_time()
                run(
                    stream,
                    strategy,  # type: ignore[arg-type]
                    network,
                    functools.partial(Adam, lr=3e-4),
                    overrides=(
                        *(f"trainer.max_epochs={asked.epochs}", "batch_size=32", *settings),
                        *("trainer.accelerator=cpu", "trainer.threads=1", "logger.mode=disabled"),
                        *("checkpoint.enabled=false", "alignment.enabled=false"),
                    ),
                    run_dir=directory,
                    resume="start" if directory.exists() else False,
                )
                print(f"{name}: {time.process_time() - began:.0f} CPU-seconds", flush=True)
            found.setdefault(name, {})[order] = numbers(directory)
    values = []
    for name, by in found.items():
        acc = np.array([one["acc"] for one in by.values()])
        one = {
            "method": name,
            "orders": sorted(by),
            "acc": float(acc.mean()),
            "acc_std": float(acc.std(ddof=1)) if len(acc) > 1 else None,
            "worst": float(acc.min()),
            "kind": "turn" if name in TURN else "merge",
        }
        for key in ("bwt", "learning_accuracy"):
            one[key] = float(np.mean([v[key] for v in by.values()]))
        values.append(one)
    values.sort(key=lambda v: (v["kind"], -v["acc"]))
    (asked.to / "table.json").write_text(json.dumps(values, indent=1))
    for v in values:
        print(f"{v['kind']:6} {v['method']:30} ACC {v['acc']:5.1f} BWT {v['bwt']:+6.1f}")


if __name__ == "__main__":
    main()
