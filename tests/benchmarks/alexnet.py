"""What GPM costs on the papers' AlexNet, batch 64, on a CPU: `make bench-alexnet`.

One process, one thread, contenders in turn, medians.

* a training step under the Trainer, projected by bases of half of every layer's inputs (where a
  projection costs most), against a free one;
* where the time of a step goes in a bare loop: with dense projectors (G - G P, P d x d, as
  published), and with ours;
* the update of all five bases after a task, from the same layer inputs, against the published
  scripts' way: a loop over patches in float64, and numpy SVDs of what it gathered, two for each
  layer. The peak memory of both, each in a child process.
"""

import argparse
import copy
import ctypes
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from step import Silent
from torch import Tensor, nn

from cl_bench.contracts import Origin, Plan, Protect, Stream, Task
from cl_bench.data import MemoryData
from cl_bench.experiment import LightningEngine, LoopSettings, quiet_lightning
from cl_bench.learners import Classifier
from cl_bench.models import AlexNetCL
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.subspace import LinearMap, Moments, grow

BATCH, CLASSES = 64, 10
SAMPLES = {"conv1": 24, "conv2": 100, "conv3": 100, "fc1": 125, "fc2": 125}
"""Samples whose inputs are decomposed, by layer, as in the published script."""
BARS = {"step": 1.10, "update": 1 / 5, "convolutions": 1 / 10, "linear": 1.0, "share": 0.02}
STEPS = 60 * 75
"""A task's least steps on CIFAR-100: 75 an epoch, and 60 epochs without any gain until ten halvings
of the rate, six epochs each, end it."""


class Noise(Task):
    """Random images: only time is measured here."""

    name, index, head, classes = "noise", 0, 0, range(CLASSES)
    origin = Origin("generated", "none", "none")

    def __init__(self, samples: int) -> None:
        rng = torch.Generator().manual_seed(0)
        x = torch.randn(samples, 3, 32, 32, generator=rng)
        y = torch.randint(0, CLASSES, (samples,), generator=rng)
        self.data = MemoryData({"x": x, "y": y, "task": torch.zeros_like(y)})

    @property
    def train(self) -> MemoryData:
        """All of it."""
        return self.data

    validation = test = train


def learner(task: Noise) -> Classifier:
    """A fresh AlexNet with one head."""
    torch.manual_seed(0)
    stream = Stream("noise", [task], "task", (3, 32, 32), "none")
    optimizer = functools.partial(torch.optim.SGD, lr=0.01)
    return Classifier(stream, AlexNetCL((3, 32, 32)), optimizer, BATCH, seed=0)


def half_bases(layers: list[LinearMap]) -> dict[str, Tensor]:
    """A random orthonormal basis of half of every layer's inputs."""
    rng = torch.Generator().manual_seed(1)
    found = {}
    for layer in layers:
        d = layer.in_features
        random = torch.randn(d, d // 2, generator=rng, dtype=torch.float64)
        found[layer.name] = torch.linalg.qr(random)[0]
    return found


def train(task: Noise, projected: bool) -> float:
    """Seconds of an epoch under the Trainer."""
    net = learner(task)
    strategy: Any = Finetune()
    if projected:
        strategy = GPM()
        layers = net.layers(strategy.protect)
        strategy.memory = half_bases(layers)
        strategy.rows_per_sample = {layer.name: rows_of(layer) for layer in layers}
    trainer = functools.partial(
        Trainer,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    record: Any = Silent()
    engine = LightningEngine(
        net, strategy, trainer, LoopSettings(batch_size=BATCH), None, record, record
    )
    with quiet_lightning():
        engine.learn(task, Plan(task.data))
    return record.seconds


def profile(task: Noise, way: str, steps: int) -> dict[str, float]:
    """Milliseconds of a step by part, in a bare loop: ``free``, ``dense`` or ``ours``."""
    net, strategy = learner(task), GPM()
    layers = net.layers(strategy.protect)
    memory = half_bases(layers) if way != "free" else {}
    dense = {n: (M @ M.t()).float() for n, M in memory.items()} if way == "dense" else {}
    if way == "ours":
        strategy.memory = memory
        strategy.rows_per_sample = {layer.name: rows_of(layer) for layer in layers}
    net.begin(task, strategy)
    optimizer = torch.optim.SGD(net.trainable_parameters(), lr=0.01)
    parts = dict.fromkeys(("forward", "backward", "projection", "update"), 0.0)

    def timed(part: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        done = work()
        parts[part] += 1e3 * (time.perf_counter() - started) / steps
        return done

    def project() -> None:
        for layer in layers:
            if layer.name in dense:
                gradient = layer.weight.grad
                assert gradient is not None
                flat = gradient.flatten(1)
                layer.weight.grad = (flat - flat @ dense[layer.name]).view_as(gradient)
        strategy.constrain(net)

    for i in range(steps):
        batch = task.data[torch.arange(i * BATCH, (i + 1) * BATCH)]
        loss, _ = timed("forward", functools.partial(net.step_loss, batch))
        optimizer.zero_grad()
        timed("backward", loss.backward)
        timed("projection", project)
        timed("update", optimizer.step)
    return parts


def rows_of(layer: LinearMap) -> float:
    """Input vectors of a layer from one sample."""
    positions = {"conv1": 29**2, "conv2": 12**2, "conv3": 5**2}
    return float(positions.get(layer.name.split(".")[-1], 1))


def inputs_of(net: Classifier, task: Noise) -> dict[str, tuple[LinearMap, Tensor]]:
    """What enters each protected layer for 125 samples."""
    found: dict[str, tuple[LinearMap, Tensor]] = {}
    handles = []
    for layer in net.layers(Protect()):

        def keep(module: nn.Module, args: tuple[Tensor], layer: LinearMap = layer) -> None:
            found[layer.name.split(".")[-1]] = (layer, args[0].detach().clone())

        handles.append(layer.module.register_forward_pre_hook(keep))
    net.eval()
    with torch.no_grad():
        net(task.sample(125, 0))
    for handle in handles:
        handle.remove()
    return found


def ours(layer: LinearMap, x: Tensor, M: Tensor) -> Tensor:
    """Stream the inputs into second moments, and grow."""
    moments = Moments(layer.in_features)
    for rows in layer.inputs(x):
        moments.add(rows)
    return grow(M, moments, 0.99)[0]


def published(layer: LinearMap, x: Tensor, M: np.ndarray, samples: int) -> np.ndarray:
    """Gather patches one by one, decompose twice."""
    act = x[:samples].numpy()
    if isinstance(layer.module, nn.Conv2d):
        k, side = layer.module.kernel_size[0], act.shape[-1]
        s = side - k + 1
        R = np.zeros((act.shape[1] * k * k, s * s * samples))
        column = 0
        for i in range(samples):
            for row in range(s):
                for col in range(s):
                    R[:, column] = act[i, :, row : row + k, col : col + k].reshape(-1)
                    column += 1
    else:
        R = act.transpose()
    total = (np.linalg.svd(R, full_matrices=False)[1] ** 2).sum()
    residual = R - np.dot(np.dot(M, M.transpose()), R)
    U, S, _ = np.linalg.svd(residual, full_matrices=False)
    explained = (total - (S**2).sum()) / total
    r = 0
    for energy in S**2 / total:
        if explained >= 0.99:
            break
        explained += energy
        r += 1
    return np.hstack((M, U[:, :r]))[:, : M.shape[0]]


def peak(work: Callable[[], object]) -> float:
    """MiB by which ``work`` raises the resident memory of a child process at its highest."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        work()  # pages of programs count as resident only from their first use
        ctypes.CDLL(None).malloc_trim(0)  # what was freed counts as well until it is given back
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
        before = _resident("VmRSS")
        work()
        os.write(writing, str(_resident("VmHWM") - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        return max(float(answer.read()), 1.0) / 1024


def _resident(key: str) -> float:
    with open("/proc/self/status") as status:
        return float(next(line.split()[1] for line in status if line.startswith(key)))


def verdict(ratio: float, bar: float) -> str:
    """A ratio beside its bar."""
    return f"{ratio:6.3f}x  bar {bar:.3f}x: {'met' if ratio <= bar else 'MISSED'}"


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30, help="steps of an epoch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, medians of {arguments.rounds} rounds\n")

    task = Noise(arguments.steps * BATCH)
    rounds = [(train(task, False), train(task, True)) for _ in range(arguments.rounds)]
    scale = 1e3 / arguments.steps
    free, projected = (scale * statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(p / f for f, p in rounds)
    print(f"a step: free {free:.1f} ms, projected {projected:.1f} ms", verdict(ratio, BARS["step"]))

    print("\nms of a step      forward backward projection   update")
    ways = ("free", "dense", "ours")
    profiles = [[profile(task, way, arguments.steps) for way in ways] for _ in range(3)]
    for i, way in enumerate(ways):
        middle = {k: statistics.median(p[i][k] for p in profiles) for k in profiles[0][i]}
        print(f"{way:16}", *(f"{value:9.1f}" for value in middle.values()))

    net = learner(task)
    found = inputs_of(net, task)
    bases = half_bases([layer for layer, _ in found.values()])
    print("\nbasis update      ours  published      ours  published")
    seconds = {name: ([], []) for name in found}  # type: ignore[var-annotated]
    for _ in range(arguments.rounds):
        for name, (layer, x) in found.items():
            M = bases[layer.name]
            plain = copy.deepcopy(M.numpy())
            for times, work in zip(
                seconds[name],
                (
                    functools.partial(ours, layer, x[: SAMPLES[name]], M),
                    functools.partial(published, layer, x, plain, SAMPLES[name]),
                ),
                strict=True,
            ):
                started = time.perf_counter()
                work()
                times.append(time.perf_counter() - started)
    memory = {"convolutions": [0.0, 0.0], "linear": [0.0, 0.0]}
    totals = [0.0, 0.0]
    for name, (layer, x) in found.items():
        M = bases[layer.name]
        a, b = (statistics.median(times) for times in seconds[name])
        totals[0], totals[1] = totals[0] + a, totals[1] + b
        peaks = (
            peak(functools.partial(ours, layer, x[: SAMPLES[name]], M)),
            peak(functools.partial(published, layer, x, M.numpy(), SAMPLES[name])),
        )
        kind = "convolutions" if name.startswith("conv") else "linear"
        memory[kind] = [max(old, new) for old, new in zip(memory[kind], peaks, strict=True)]
        print(
            f"{name:10} {1e3 * a:8.1f} ms {1e3 * b:7.0f} ms "
            f" {peaks[0]:5.1f} MiB {peaks[1]:6.1f} MiB"
        )
    print(f"all        {1e3 * totals[0]:8.1f} ms {1e3 * totals[1]:7.0f} ms")
    print("time   ", verdict(totals[0] / totals[1], BARS["update"]))
    share = totals[0] / (STEPS * free / 1e3)
    print(f"share of a task's training, {STEPS} steps:", verdict(share, BARS["share"]))
    for kind, (a, b) in memory.items():
        print(f"peak on {kind}: {verdict(a / b, BARS[kind])}")


if __name__ == "__main__":
    main()
