"""Whole training steps of GPM, ours under the Trainer against bare PyTorch loops: `make bench`.

One process, one thread, contenders in turn, median over rounds. The network is PMNIST's MLP
784-100-100-10 without biases under plain SGD; the data lies in memory; five epochs, as PMNIST has.

* ``free``: a bare loop without projection.
* ``projector``: that loop with G - G P, P = M M^T (d x d) built once, as the published scripts do.
* ``ours``: the LightningEngine with strategy GPM, 64 batches handed to one training step.
* ``rogo``: as ``ours`` with strategy ROGO, 14 and 12 directions of its last two layers' inputs
  relaxed, as in later tasks of PMNIST.
* ``ours, pack=1``: GPM with Lightning's automatic optimization, a batch a training step.
"""

import argparse
import functools
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from lightning import Trainer
from torch import Tensor, nn

from cl_bench.contracts import Learner, Origin, Plan, Stream, Task
from cl_bench.data import MemoryData
from cl_bench.experiment import LightningEngine, LoopSettings, TrainLoader, quiet_lightning
from cl_bench.learners import Classifier
from cl_bench.models import MLP
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.projection.rogo import ROGO

WIDTHS = (784, 100, 100)
HIDDEN_RANKS = (95, 75)
RELAXED = (0, 14, 12)
EPOCHS = 5
BARS = {
    (10, 100): 0.40,
    (10, 400): 0.45,
    (10, 650): 0.40,
    (128, 100): 0.85,
    (128, 400): 1.15,
    (128, 650): 0.85,
}
"""At most this share of the projector loop, by (batch size, rank of the first layer)."""


class Noise(Task):
    """Random inputs and labels: only time is measured here."""

    name, index, head, classes = "noise", 0, 0, range(10)
    origin = Origin("generated", "none", "none")

    def __init__(self, samples: int) -> None:
        rng = torch.Generator().manual_seed(0)
        x = torch.randn(samples, 784, generator=rng)
        self.data = MemoryData({"x": x, "y": torch.randint(0, 10, (samples,), generator=rng)})

    @property
    def train(self) -> MemoryData:
        """All of it."""
        return self.data

    validation = test = train


class Silent:
    """Stands in for the record and the display; keeps the seconds of each epoch."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def epoch(self, *_: Any, **event: Any) -> None:
        """Add an epoch."""
        self.seconds += event.get("seconds", 0.0)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


class Relaxed(ROGO):
    """ROGO with spaces that were relaxed before the first step."""

    def setup(self, learner: Learner, task: Task) -> None:
        """Relax as many directions of every layer as ``RELAXED`` says, and no more later."""
        super().setup(learner, task)
        assert self.relaxed is not None
        assert self.confinement is not None
        for layer, count in zip(self.layers, RELAXED, strict=True):
            if count:
                self.relaxed.grow(layer.name, self.memory[layer.name][:, :count])
        self.confinement.replace({name: self.projection(name) for name in self.relaxed.spaces})
        self.searching = False


def bases(rank: int) -> list[Tensor]:
    """A random orthonormal basis for each layer."""
    rng = torch.Generator().manual_seed(rank)
    shapes = zip(WIDTHS, (rank, *HIDDEN_RANKS), strict=True)
    return [torch.linalg.qr(torch.randn(d, k, generator=rng).double())[0] for d, k in shapes]


def bare(task: Noise, batch_size: int, memory: list[Tensor] | None) -> float:
    """Seconds of a plain loop, with dense projectors if ``memory`` is given."""
    net = nn.Sequential(MLP((784,)), nn.Linear(100, 10, bias=False))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    projectors = [(M @ M.t()).float() for M in memory or ()]
    loader = TrainLoader(task.data, batch_size, seed=0, task=0)
    started = time.perf_counter()
    for _ in range(EPOCHS):
        for batch in loader:
            loss = F.cross_entropy(net(batch["x"]), batch["y"])
            optimizer.zero_grad()
            loss.backward()
            for weight, P in zip(net.parameters(), projectors, strict=False):
                gradient = weight.grad.data
                weight.grad.data = gradient - torch.mm(gradient.view(gradient.size(0), -1), P)
            optimizer.step()
    return time.perf_counter() - started


def ours(
    task: Noise,
    batch_size: int,
    memory: list[Tensor],
    pack: int = 64,
    rule: type[GPM] = GPM,
) -> float:
    """Seconds of the same steps under the Trainer."""
    stream = Stream("noise", [task], "domain", (784,), "none")
    optimizer = functools.partial(torch.optim.SGD, lr=0.01)
    learner = Classifier(stream, MLP((784,)), optimizer, batch_size, seed=0, pack=pack)
    strategy = rule()
    names = [layer.name for layer in learner.layers(strategy.protect)]
    strategy.memory = dict(zip(names, memory, strict=True))
    strategy.rows_per_sample = dict.fromkeys(names, 1.0)
    trainer = functools.partial(
        Trainer,
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    record: Any = Silent()
    settings = LoopSettings(seed=0, batch_size=batch_size, pack=pack)
    engine = LightningEngine(learner, strategy, trainer, settings, None, record, record)
    with quiet_lightning():
        engine.learn(task, Plan(task.data))
    return record.seconds


def main() -> None:
    """Print a table of microseconds per step and of ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600, help="steps of an epoch")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, {EPOCHS} epochs of {arguments.steps} steps,")
    print(f"median of {arguments.rounds} rounds; microseconds per step\n")
    print("batch rank     free projector     ours     rogo   pack=1", end="  ")
    print("ours/free  rogo/free  ours/projector  bar")
    for batch_size in (10, 128):
        task = Noise(arguments.steps * batch_size)
        for rank in (100, 400, 650):
            memory = bases(rank)
            contenders = (
                lambda: bare(task, batch_size, None),  # noqa: B023
                lambda: bare(task, batch_size, memory),  # noqa: B023
                lambda: ours(task, batch_size, memory),  # noqa: B023
                lambda: ours(task, batch_size, memory, rule=Relaxed),  # noqa: B023
                lambda: ours(task, batch_size, memory, pack=1),  # noqa: B023
            )
            rounds = [[run() for run in contenders] for _ in range(arguments.rounds)]
            scale = 1e6 / (EPOCHS * arguments.steps)
            free, projector, packed, relaxed, single = (
                scale * statistics.median(column) for column in zip(*rounds, strict=True)
            )
            to_free = statistics.median(r[2] / r[0] for r in rounds)
            rogo_to_free = statistics.median(r[3] / r[0] for r in rounds)
            to_projector = statistics.median(r[2] / r[1] for r in rounds)
            bar = BARS[batch_size, rank]
            verdict = "met" if to_projector <= bar else "MISSED"
            print(
                f"{batch_size:5} {rank:4} {free:8.0f} {projector:9.0f} {packed:8.0f}"
                f" {relaxed:8.0f} {single:8.0f}  {to_free:8.2f}x"
                f"  {rogo_to_free:8.2f}x  {to_projector:13.2f}x"
                f"  {bar:.2f} {verdict}",
                flush=True,
            )


if __name__ == "__main__":
    main()
