"""Adaptive SVD goes on after a kill, and in a group of processes."""

import functools
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cores import OPTIMIZERS, half
from dying import die, noisy, same
from dying import learn as conducted
from toys import mlp

from cl_bench.strategies.svd.adaptive_svd import AdaptiveSVD

pytestmark = pytest.mark.usefixtures("no_pictures")

ROOT = Path(__file__).parents[3]


# -- padding, resuming, processes, the command line ------------------------------------------------


def leaning():
    """Layers whose outputs point where their inputs do, on the whole."""
    model = mlp()
    with torch.no_grad():
        for layer in (model.fc1, model.fc2):
            layer.weight.add_(torch.eye(*layer.weight.shape))
    return model


svd = AdaptiveSVD
RUNS = {
    "importance": {
        "strategy": functools.partial(svd, "importance", mrr=0.2, trr=0.6, samples=20),
        "optimizer": OPTIMIZERS["adam"],
        "model": leaning,
    },
    "core": {"strategy": svd, "optimizer": OPTIMIZERS["adamw"]},
    "core-packed": {"strategy": svd, "optimizer": OPTIMIZERS["momentum"], "pack": 2},
    "core-noisy": {
        "strategy": functools.partial(AdaptiveSVD, **half(train_rest="norms", start_task=0)),
        "optimizer": OPTIMIZERS["adam"],
        "model": noisy,
        "accumulate_grad_batches": 2,
        "every": 2,
    },
    "steps": {
        "strategy": functools.partial(svd, parametrisation="dense_projected"),
        "optimizer": OPTIMIZERS["adam"],
    },
    "factors": {
        "strategy": functools.partial(svd, parametrisation="factored"),
        "optimizer": OPTIMIZERS["adam"],
    },
}


@pytest.mark.parametrize("case", RUNS)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, case):
    options = RUNS[case]
    learner, _ = conducted(tmp_path / "whole", **options)
    for moment in (0.45, 0.85):
        directory = tmp_path / str(moment)
        die(directory, dies_at=int(moment * learner.batches), **options)
        conducted(directory, resume=True, **options)
        same(tmp_path / "whole", directory)


def test_the_core_goes_on_in_the_bases_that_it_was_trained_in(tmp_path, monkeypatch):
    """Decomposed anew, on another device perhaps, they could be others."""
    options = RUNS["core"]
    learner, _ = conducted(tmp_path / "whole", **options)
    die(tmp_path / "run", dies_at=int(0.85 * learner.batches), **options)
    monkeypatch.delattr(AdaptiveSVD, "decompose")
    conducted(tmp_path / "run", resume=True, **options)
    same(tmp_path / "whole", tmp_path / "run")


WORKER = """
import sys
import torch
from torch import distributed as dist, nn
from torch.optim import AdamW
from cl_bench.subspace import CoreUpdate, LinearMap, Restriction, spectra

rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 9, bias=False))
x = torch.randn(8, 6)
if rank == 1:
    original, turn = torch.linalg.eigh, torch.linalg.qr(torch.randn(6, 6).double())[0]
    torch.linalg.eigh = lambda A: (original(A)[0], original(A)[1] @ turn)
layers = [LinearMap(str(i), model[i]) for i in (0, 2)]
starts = [layer.weight.detach().clone() for layer in layers]
updates = [
    CoreUpdate(layers[i], Restriction(s.split(3), "two_sided"), starts[i])
    for i, s in spectra(starts)
]
optimizer = AdamW([u.B for u in updates], lr=1e-2)
for _ in range(5):
    model(x[rank::world]).square().mean().backward()
    for update in updates:
        if world > 1:
            dist.all_reduce(update.layer.weight.grad)
            update.layer.weight.grad /= world
        update.pull_back()
    optimizer.step()
    for update in updates:
        update.push_forward()
torch.save([layer.weight.detach() for layer in layers], out)
"""


def test_processes_of_a_group_share_bases_and_weights(tmp_path, monkeypatch):
    """Two gloo processes, of which the second finds other eigenvectors, against one."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    outs = [tmp_path / f"{i}.pt" for i in range(3)]
    commands = [
        [str(a) for a in (script, rank, world, tmp_path / "store", out)]
        for rank, world, out in zip((0, 1, 0), (2, 2, 1), outs, strict=True)
    ]
    started = [subprocess.Popen([sys.executable, *c], env=environment) for c in commands[:2]]
    monkeypatch.setattr(sys, "argv", commands[2])
    runpy.run_path(str(script))
    for process in started:
        assert process.wait(timeout=300) == 0
    first, second, alone = (torch.load(out) for out in outs)
    for a, b, c in zip(alone, first, second, strict=True):
        assert torch.equal(b, c)
        assert torch.allclose(a, b, atol=1e-5)
