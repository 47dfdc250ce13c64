"""What a step costs on a GPU under every strategy: `python tests/benchmarks/gpu.py`.

The papers' AlexNet (batch 64), and a T5 of T5-large's size in bf16-mixed (16 sequences of 256
tokens). Each contender learns a first task, so that it has a memory; an epoch of a second one is
timed, the first epoch of it left out, contenders in turn, medians, against finetune. Random data:
only time and memory are measured. ``--device cpu --size tiny`` tries the script out without a GPU.
"""

import argparse
import functools
import statistics
import string
from collections.abc import Callable, Mapping
from typing import Any

import torch
from adaptive_svd import t5
from alexnet import AlexNetCL
from lightning import Trainer
from torch.optim import SGD, AdamW

from cl_bench.contracts import Origin, Stream, Task
from cl_bench.data import MemoryData
from cl_bench.experiment import LightningEngine, LoopSettings, quiet_lightning
from cl_bench.learners import BaseLearner, Classifier, language
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.isolation.freeze import Freeze
from cl_bench.strategies.lowrank.o_lora import OLoRA
from cl_bench.strategies.projection.adam_nscl import AdamNSCL
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.projection.rogo import ROGO
from cl_bench.strategies.projection.sgp import SGP
from cl_bench.strategies.projection.trgp import TRGP
from cl_bench.strategies.replay.er import ER
from cl_bench.strategies.svd.adaptive_svd import AdaptiveSVD
from cl_bench.tasks.text import Example, Prompt, TextStream, TextTask

EPOCHS = 3
SHARED: dict[str, Callable[[], Any]] = {
    "finetune": Finetune,
    "er": ER,
    "gpm": GPM,
    "sgp": SGP,
    "rogo": ROGO,
    "adam_nscl": AdamNSCL,
}
IMAGES = {**SHARED, "trgp": TRGP}
TEXTS = {
    **SHARED,
    "freeze": functools.partial(Freeze, tied="train"),
    "adaptive_svd": AdaptiveSVD,
    "o_lora": functools.partial(OLoRA, rank=8),
}


class Timed:
    """Stands in for the record and the display; keeps the seconds of the later epochs."""

    def __init__(self) -> None:
        self.epochs: list[float] = []

    def epoch(self, *_: Any, **event: Any) -> None:
        """Keep one; but a task's first epoch warms up."""
        if event.get("epoch", 0) > 1 and event.get("task"):
            self.epochs.append(event["seconds"] / event["steps"])

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class Noise(Task):
    """Random images with labels."""

    origin = Origin("generated", "none", "none")

    def __init__(self, index: int, samples: int) -> None:
        self.name, self.index, self.head, self.classes = f"noise{index}", index, 0, range(10)
        rng = torch.Generator().manual_seed(index)
        y = torch.randint(0, 10, (samples,), generator=rng)
        x = torch.randn(samples, 3, 32, 32, generator=rng)
        self.data = MemoryData({"x": x, "y": y, "task": torch.zeros_like(y)})

    @property
    def train(self) -> MemoryData:
        """All of it."""
        return self.data

    validation = test = train


def images(steps: int) -> tuple[Stream, BaseLearner]:
    """Two tasks, and the papers' AlexNet."""
    torch.manual_seed(0)
    stream = Stream("noise", [Noise(i, 64 * steps) for i in (0, 1)], "domain", (3, 32, 32), "none")
    optimizer = functools.partial(SGD, lr=0.01)
    return stream, Classifier(stream, AlexNetCL((3, 32, 32)), optimizer, 64, seed=0)


def texts(steps: int, size: str) -> tuple[Stream, BaseLearner]:
    """Two tasks of random letters, and a T5."""
    rng, prompt, tasks = torch.Generator().manual_seed(0), Prompt("text", False), []
    for index in (0, 1):
        rows = []
        for _ in range(16 * steps):
            letters = torch.randint(0, 26, (250,), generator=rng).tolist()
            text = "".join(string.ascii_lowercase[i] for i in letters)
            rows.append(Example(text, prompt(text, "TC", "noise", ["a"]), text[:7]))
        splits = {"train": rows, "validation": rows[:1], "test": rows[:1]}
        origin = Origin("generated", "none", "none")
        tasks.append(TextTask(f"noise{index}", index, splits, ["a"], "exact_match", origin))
    stream = TextStream("noise", tasks, "bytes", 256, 8, False)
    optimizer = functools.partial(AdamW, lr=1e-4)
    return stream, language(stream, t5(size), optimizer, batch_size=16, seed=0)


def step(
    make: Callable[[], Any], world: Callable[[], tuple[Stream, BaseLearner]], options: Mapping
) -> tuple[float, float]:
    """Seconds of a step in the second task, and GiB held at most."""
    stream, learner = world()
    strategy, record = make(), Timed()
    cuda = options["accelerator"] == "gpu"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer = functools.partial(
        Trainer,
        **options,
        devices=1,
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    silent: Any = record
    loop = LoopSettings(batch_size=learner.batch_size)
    engine = LightningEngine(learner, strategy, trainer, loop, None, silent, silent)
    with quiet_lightning():
        for t in (0, 1):
            engine.learn(stream[t], strategy.plan(stream, t))
    return min(record.epochs), torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0


def compare(
    title: str,
    contenders: Mapping[str, Callable[[], Any]],
    world: Callable[[], tuple[Stream, BaseLearner]],
    options: Mapping[str, Any],
    rounds: int,
) -> None:
    """Print a table."""
    print(f"\n{title}", flush=True)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, make in contenders.items():
            found[name].append(step(make, world, options))
    free = statistics.median(seconds for seconds, _ in found["finetune"])
    for name, rows in found.items():
        seconds = statistics.median(s for s, _ in rows)
        memory = max(m for _, m in rows)
        print(f"{name:14} {1e3 * seconds:9.2f} ms  {seconds / free:5.2f}x  {memory:6.1f} GiB")


def main() -> None:
    """Both networks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", default="large", choices=("tiny", "small", "large"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50, help="of an epoch")
    parser.add_argument("--only", default="images,texts", help="which, by comma")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA GPU is here; --device cpu --size tiny tries the script out")
    where = "gpu" if args.device == "cuda" else "cpu"
    name = torch.cuda.get_device_name() if where == "gpu" else "CPU"
    print(f"torch {torch.__version__}, {name}")
    wanted = args.only.split(",")
    if "images" in wanted:
        world = functools.partial(images, args.steps)
        compare("AlexNet, batch 64, float32", IMAGES, world, {"accelerator": where}, args.rounds)
    if "texts" in wanted:
        options = {"accelerator": where, "precision": "bf16-mixed"}
        title = f"T5-{args.size} size, 16 x 256 tokens, bf16-mixed"
        compare(title, TEXTS, functools.partial(texts, args.steps, args.size), options, args.rounds)


if __name__ == "__main__":
    main()
