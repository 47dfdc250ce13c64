"""A stranger's loop in as many processes as torchrun starts, held against one process.

python -m torch.distributed.run --standalone --nproc-per-node=2 tests/helpers/strangers.py
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

sys.path.insert(0, str(Path(__file__).parents[2]))

from cl_bench.integrations import Guarded
from cl_bench.strategies import AGEM, DER, ER, EWC, GPM, ROGO, AdaptiveSVD, Freeze

STRATEGIES = {
    "gpm": lambda: GPM(0.95, samples=24),
    "ewc": lambda: EWC(10.0, samples=24),
    "er": lambda: ER(16),
    "der": lambda: DER(memory=16),
    "agem": lambda: AGEM(memory=16, reference=8),
    "rogo": lambda: ROGO(threshold=0.97, cosine=0.5, samples=24, relax_samples=24),
    "adaptive_svd": AdaptiveSVD,
    "freeze": lambda: Freeze(n_blocks=1),
}
BATCH = 16


def data(t):
    rng = torch.Generator().manual_seed(t)
    y = torch.arange(48) % 3
    return (2 * torch.randn(3, 12, generator=rng))[y].double() + 0.3 * torch.randn(
        48, 12, generator=rng
    ).double(), y


def learned(name):
    """Weights and memory after two tasks; each process has its half of every batch and sample."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(12, 16), nn.ReLU()),
        nn.Sequential(nn.Linear(16, 16), nn.ReLU()),
        nn.Linear(16, 3),
    ).double()
    guard = Guarded(model, STRATEGIES[name](), loss=F.cross_entropy, heads=["2"])
    for t in range(2):
        x, y = data(t)
        part = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
        with guard.task(sample=(x[part], y[part]), epochs=2):
            optimizer = SGD(guard.param_groups(), lr=0.1)
            trained = DistributedDataParallel(model) if world > 1 else model
            for _ in range(2):
                for i in range(0, len(x), BATCH):
                    size = BATCH // world
                    own = slice(i + rank * size, i + (rank + 1) * size)
                    batch = {"x": x[own], "y": y[own], "plain": x[own]}
                    batch = guard.on_batch(batch)
                    out = trained(batch["x"])
                    optimizer.zero_grad()
                    loss = guard.objective(batch, out) + guard.penalty(batch, out)
                    loss.backward()
                    optimizer.step()
                guard.after_epoch()
    return {k: v.clone() for k, v in model.state_dict().items()}


def main():
    alone = {name: learned(name) for name in STRATEGIES}
    dist.init_process_group("gloo")
    for name, wanted in alone.items():
        found = learned(name)
        for key, value in wanted.items():
            gap = float((found[key] - value).abs().max())
            print(name, key, gap, flush=True)
            assert gap < 1e-9, f"{name}: {key} differs by {gap}"
        everyones = [None, None]
        dist.all_gather_object(everyones, found)
        assert all(torch.equal(everyones[0][k], everyones[1][k]) for k in wanted), name
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
