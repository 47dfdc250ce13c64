"""What the federated engine costs beside a bare loop of the same local SGD: `make bench`.

One process, one thread, contenders in turn, median over rounds; milliseconds a client-round.

* ``bare``: weights copied in, a new optimizer, an epoch of plain PyTorch, the change taken.
* ``engine``: FederatedEngine with strategy FOT, server step and records' bookkeeping included.

The engine may take 1.25 times as long. And: the memory that a client's statistics need for the
convolution of the AlexNet with the largest patch matrix, against that matrix and Omega whole.
"""

import argparse
import functools
import math
import multiprocessing
import resource
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cl_bench.contracts import Origin, Plan, Protect, Stream, Task, generator
from cl_bench.data import MemoryData
from cl_bench.experiment import LoopSettings
from cl_bench.federation import FederatedEngine, Federation, client_statistics
from cl_bench.federation.client import Turn, client_weights
from cl_bench.federation.partition import ClientTask, Part
from cl_bench.learners import Classifier
from cl_bench.models import MLP, AlexNetCL
from cl_bench.strategies.federated.fot import FOT

BAR = 1.25
CASES = {
    # shape, hidden widths, dropout, samples a client, batch size
    "permuted MNIST": ((1, 28, 28), (400, 400, 400), (0.2, 0.5, 0.5), 480, 64),
    "digits": ((1, 8, 8), (100, 100), (), 64, 10),
}
CLIENTS, ROUNDS = 8, 4
IMAGES = 500


class Noise(Task):
    """Random images and labels: only time and memory are measured here."""

    name, index, head, classes = "noise", 0, 0, range(10)
    origin = Origin("generated", "none", "none")

    def __init__(self, samples: int, shape: tuple[int, ...]) -> None:
        rng = generator(0, "noise")
        x = torch.randn(samples, *shape, generator=rng)
        self.data = MemoryData({"x": x, "y": torch.randint(0, 10, (samples,), generator=rng)})

    @property
    def train(self) -> MemoryData:
        """All of it."""
        return self.data

    validation = test = train


class Silent:
    """A record and a display that keep nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def contenders(case: str) -> tuple[Any, Any]:
    """The engine's rounds and the bare loop's, as functions of nothing."""
    shape, hidden, dropout, samples, batch_size = CASES[case]
    task = Noise(samples * CLIENTS, shape)
    stream = Stream("noise", [task], "domain", shape, "")
    sgd = functools.partial(torch.optim.SGD, lr=0.01, foreach=False)
    learner = Classifier(stream, MLP(shape, hidden, True, dropout), sgd, batch_size, 0, 1, True)
    settings = Federation(clients=CLIENTS, per_round=CLIENTS, rounds=ROUNDS)
    loop = LoopSettings(batch_size=batch_size)
    silent: Any = Silent()
    strategy = FOT()
    engine = FederatedEngine(
        learner, strategy, None, loop, None, silent, silent, federation=settings
    )
    # Statistics come once a task, not once a round.
    engine._end = lambda *arguments: None  # type: ignore[method-assign]
    x, y = task.data.tensors["x"], task.data.tensors["y"]
    net = nn.Sequential(*learner.backbone, learner.heads[0])
    parameters = list(net.parameters())
    held = torch.randperm(len(x)).split(samples)

    def bare() -> list[Tensor]:
        start = [p.detach().clone() for p in parameters]
        total = [torch.zeros_like(p) for p in start]
        net.train()
        for rows in held:
            with torch.no_grad():
                torch._foreach_copy_(parameters, start)
            optimizer = sgd(parameters)
            order = rows[torch.randperm(samples)]
            for index in order.split(batch_size):
                loss = F.cross_entropy(net(x[index]), y[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                torch._foreach_add_(total, torch._foreach_sub(parameters, start))
        with torch.no_grad():
            torch._foreach_copy_(parameters, start)
        return total

    def rounds() -> None:
        for _ in range(ROUNDS):
            bare()

    return lambda: engine.learn(task, Plan(task.train)), rounds


def compare(case: str, repeats: int) -> bool:
    """Print milliseconds a client-round; returns whether the bar is met."""
    took: dict[str, list[float]] = {"engine": [], "bare": []}
    runs = dict(zip(took, contenders(case), strict=True))
    for repeat in range(repeats + 2):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            if repeat >= 2:
                took[name].append((time.perf_counter() - begun) * 1e3 / CLIENTS / ROUNDS)
    engine, bare = statistics.median(took["engine"]), statistics.median(took["bare"])
    met = engine <= BAR * bare
    print(
        f"{case:15}  bare {bare:7.2f}  engine {engine:7.2f}  ratio {engine / bare:.2f}"
        f"  (bar {BAR}){'' if met else '  MISSED'}",
        flush=True,
    )
    return met


def _peak(what: str, queue: Any) -> None:
    """Megabytes that one way of making the statistics adds to what the process held before."""
    torch.set_num_threads(1)
    shape = (3, 32, 32)
    task = Noise(IMAGES, shape)
    stream = Stream("noise", [task], "domain", shape, "")
    sgd = functools.partial(torch.optim.SGD, lr=0.01)
    learner = Classifier(stream, AlexNetCL(shape), sgd, 16, 0, 1)
    protect = Protect(include=("backbone.conv2",), bias="free")
    learner.begin(task, FOT())
    layer = learner.layers(protect)[0]
    inputs: list[Tensor] = []
    hook = layer.module.register_forward_pre_hook(lambda _, x: inputs.append(x[0].detach()))
    with torch.no_grad():
        learner.eval()
        for index in torch.arange(IMAGES).split(16):
            learner(task.train[index])
    hook.remove()
    x = torch.cat(inputs)
    inputs.clear()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if what == "patch matrix":
        A = F.unfold(x, layer.module.kernel_size).transpose(1, 2).reshape(-1, layer.in_features)
        A.t() @ torch.randn(len(A), layer.in_features)
    else:
        strategy = FOT(sketch="gaussian", protect=protect)
        client = ClientTask(task, Part(task.train, torch.arange(IMAGES)))
        client_statistics(learner, strategy, client_weights(learner), client, Turn(0, 0, 0, 0))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    patches = math.prod(
        n - k + 1 for n, k in zip(x.shape[2:], layer.module.kernel_size, strict=True)
    )
    queue.put((after - before, IMAGES * patches * layer.in_features * 4 / 1e6))


def memory() -> None:
    """Print what the statistics of the AlexNet's second convolution need."""
    context = multiprocessing.get_context("spawn")
    for what in ("patch matrix", "streamed"):
        queue = context.Queue()
        process = context.Process(target=_peak, args=(what, queue))
        process.start()
        kilobytes, matrix = queue.get()
        process.join()
        print(
            f"{what:15}  {kilobytes / 1e3:7.0f} MB more at the peak, {IMAGES} images "
            f"(the patch matrix alone: {matrix:.0f} MB)",
            flush=True,
        )


def main() -> int:
    """Returns 0 if the bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    met = [compare(case, given.repeats) for case in CASES]
    memory()
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main())
