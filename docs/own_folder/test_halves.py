"""A task moves what its mask shows, all of it, and nothing else."""

import torch
from mine.halves import Halves
from safetensors.torch import load_file

from cl_bench import run


def test_only_the_masked_half_moves(tmp_path):
    short = ["stream.num_tasks=1", "trainer.max_epochs=1", "logger.mode=disabled"]
    result = run("permuted_digits", Halves(share=0.5), run_dir=tmp_path / "run", overrides=short)
    before, after = (
        load_file(result.directory / f"weights/task000{learned}.safetensors") for learned in (0, 1)
    )
    masks = result.strategy.masks
    assert masks
    for name, mask in masks.items():
        moved = before[name] != after[name]
        assert not torch.any(moved & ~mask), name
        assert torch.any(moved & mask), name
