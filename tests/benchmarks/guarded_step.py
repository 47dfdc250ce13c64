"""What a guarded step of GPM costs in a stranger's loop: ``tests/benchmarks/guarded_step.py``.

The papers' AlexNet at batch 64 and a tiny Llama at 4,096 tokens, one thread, bases of half of every
layer's inputs. A bare step and a guarded one take turns, ``--pairs`` times; the second of each pair
is the first of the next turn's. Prints medians and the median of the pairs' ratios as a row of
``docs/results/guarded_step.json``.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.optim import SGD, AdamW
from transformers import LlamaConfig, LlamaForCausalLM

from cl_bench.integrations import Guarded
from cl_bench.models import AlexNetCL
from cl_bench.strategies.projection.gpm import GPM

BAR = 1.15


def alexnet() -> tuple[nn.Module, dict[str, torch.Tensor], Callable[..., torch.Tensor]]:
    """Model, batch and loss."""
    torch.manual_seed(0)
    model = nn.Sequential(AlexNetCL((3, 32, 32)), nn.Flatten())
    with torch.no_grad():
        width = model(torch.zeros(2, 3, 32, 32)).shape[1]
    model = nn.Sequential(*model, nn.Linear(width, 10))
    batch = {"x": torch.randn(64, 3, 32, 32), "y": torch.randint(10, (64,))}
    return model, batch, lambda m, b: F.cross_entropy(m(b["x"]), b["y"])


def llama() -> tuple[nn.Module, dict[str, torch.Tensor], Callable[..., torch.Tensor]]:
    """Model, batch of 16 texts of 256 tokens, and loss."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    tokens = torch.randint(512, (16, 256))
    batch = {"input_ids": tokens, "labels": tokens}
    return LlamaForCausalLM(config), batch, lambda m, b: m(**b).loss


def guarded(model: nn.Module, batch: dict[str, torch.Tensor]) -> Guarded:
    """The model with a memory of half of every layer's inputs."""
    guard = Guarded(model, GPM(), inputs=len(next(iter(batch.values()))))
    rng = torch.Generator().manual_seed(1)
    strategy = guard.strategy
    for layer in guard.learner.layers(strategy.protect):
        d = layer.in_features
        random = torch.randn(d, d // 2, generator=rng, dtype=torch.float64)
        strategy.memory[layer.name] = torch.linalg.qr(random)[0]
        strategy.rows_per_sample[layer.name] = 1.0
    guard.before(1)
    return guard


def step(model, optimizer, batch, loss) -> float:
    """Seconds of one."""
    began = time.perf_counter()
    optimizer.zero_grad()
    loss(model, batch).backward()
    optimizer.step()
    return time.perf_counter() - began


def measure(name: str, pairs: int) -> dict[str, object]:
    """Bare and guarded steps in turn."""
    model, batch, loss = {"alexnet": alexnet, "llama": llama}[name]()
    twin = copy.deepcopy(model)
    kind = {"alexnet": lambda p: SGD(p, lr=0.01), "llama": lambda p: AdamW(p, lr=1e-3)}[name]
    guard = guarded(twin, batch)
    bare, ours, ratios = kind(model.parameters()), kind(twin.parameters()), []
    times: dict[str, list[float]] = {"bare": [], "guarded": []}
    with guard.task(ours, sample=batch):
        for i in range(-2, pairs):
            order = [("bare", model, bare), ("guarded", twin, ours)]
            found = {}
            for key, net, optimizer in order if i % 2 else order[::-1]:
                found[key] = step(net, optimizer, batch, loss)
            if i >= 0:
                for key, seconds in found.items():
                    times[key].append(seconds)
                ratios.append(found["guarded"] / found["bare"])
    return {
        "network": name,
        "bare": round(1000 * statistics.median(times["bare"]), 1),
        "guarded": round(1000 * statistics.median(times["guarded"]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "pairs": pairs,
    }


def main() -> None:
    """Print a row for each network, and whether it is below the bar."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--networks", nargs="+", default=["alexnet", "llama"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in asked.networks:
        row = measure(name, asked.pairs)
        print(json.dumps(row), "within" if row["ratio"] <= BAR else "above", BAR, flush=True)  # type: ignore[operator]


if __name__ == "__main__":
    main()
