"""Training steps of two published networks with our Dropout and with torch's, on one CPU thread.

One process, contenders in turn, medians: `python tests/benchmarks/dropout.py`.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cl_bench.models import MLP, AlexNetCL, Dropout

BATCH = 64


def with_torch_dropout(network: nn.Module) -> nn.Module:
    """A copy of the network with ``nn.Dropout`` in the places of ours."""
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Dropout):
                setattr(module, name, nn.Dropout(child.p))
    return network


def stepper(network: nn.Module, shape: tuple[int, ...]) -> Callable[[], None]:
    """A bare training step on random images."""
    x, y = torch.randn(BATCH, *shape), torch.randint(0, 10, (BATCH,))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(network(x), y).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mlp = MLP((1, 28, 28), (400, 400, 400), bias=True, dropout=(0.2, 0.5, 0.5))
    networks = {
        "MLP of FOT": (nn.Sequential(mlp, nn.Linear(400, 10)), (1, 28, 28), 200),
        "AlexNet": (nn.Sequential(AlexNetCL((3, 32, 32)), nn.Linear(2048, 10)), (3, 32, 32), 10),
    }
    print(f"torch {torch.__version__}, 1 thread, batch {BATCH}, medians of {rounds} rounds\n")
    for name, (network, shape, steps) in networks.items():
        contenders = [stepper(n, shape) for n in (network, with_torch_dropout(network))]
        seconds: list[list[float]] = [[], []]
        for timed in range(-1, rounds):  # the first one warms up
            for step, taken in zip(contenders, seconds, strict=True):
                begun = time.perf_counter()
                for _ in range(steps):
                    step()
                if timed >= 0:
                    taken.append((time.perf_counter() - begun) / steps)
        ours, theirs = (1e3 * statistics.median(taken) for taken in seconds)
        ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
        print(f"{name:12} ours {ours:7.2f} ms  nn.Dropout {theirs:7.2f} ms  {ratio:.2f}x")


if __name__ == "__main__":
    main()
