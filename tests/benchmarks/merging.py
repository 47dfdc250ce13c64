"""OPCM's fold of four models of 100 million parameters, thin form beside a full decomposition.

    python tests/benchmarks/merging.py

Random float32 task vectors with the matrices of a transformer (12 blocks, width 768: query, key,
value and output, or the first three as one; two of the feed-forward part) and an embedding. Matrix
by matrix, thin and full take turns; times are added up.
"""

import argparse
import time

import torch
from torch import Tensor

from cl_bench.merging import Opcm
from cl_bench.merging.rule import Part

BLOCKS, WIDTH, WORDS, MODELS = 12, 768, 20_000, 4
SHAPES = {
    "q, k and v apart": [(WIDTH, WIDTH)] * 4 + [(4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)],
    "q, k and v as one": [
        (3 * WIDTH, WIDTH),
        (WIDTH, WIDTH),
        (4 * WIDTH, WIDTH),
        (WIDTH, 4 * WIDTH),
    ],
}
"""Matrices of a block."""


def full(merge: Tensor, delta: Tensor, alpha: float) -> Tensor:
    """P(delta) as published: in the full bases of the merge."""
    u, s, vh = torch.linalg.svd(merge, full_matrices=True)
    shares = s.cumsum(0) / s.sum()
    r = int((shares > alpha).int().argmax())
    z = u.t() @ delta @ vh.t()
    z.diagonal().zero_()
    z[:r, :r] = 0
    projected: Tensor = u @ z @ vh
    return projected


def main() -> None:
    """Print seconds and the largest difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    blocks = parser.parse_args().blocks
    torch.set_num_threads(1)
    rule, rng = Opcm(alpha=0.5), torch.Generator().manual_seed(0)
    for name, shapes in SHAPES.items():
        parameters = blocks * sum(m * n for m, n in shapes) + WORDS * WIDTH
        ours, reference, gap = 0.0, 0.0, 0.0
        for i, shape in enumerate(shapes * blocks):
            deltas = [1e-3 * torch.randn(shape, generator=rng) for _ in range(MODELS)]
            began = time.perf_counter()
            fold = {}
            for index, delta in enumerate(deltas):
                fold = rule.fold(fold, delta, Part("w", True, index))
            ours += time.perf_counter() - began
            began = time.perf_counter()
            merge = deltas[0]
            for delta in deltas[1:]:
                merge = merge + full(merge, delta, 0.5)
            reference += time.perf_counter() - began
            if i < len(shapes):  # singular pairs that lie close together are float32's guess
                exact = deltas[0].double()
                for delta in deltas[1:]:
                    exact = exact + full(exact, delta.double(), 0.5)
                gap = max(gap, float((fold["sum"] - exact).abs().max() / exact.abs().max()))
        print(
            f"{name}: {parameters / 1e6:.0f} M parameters, {MODELS} models, thin {ours:.1f} s, "
            f"full {reference:.1f} s, {ours / reference:.2f}x, off by {gap:.1e} (float64)",
            flush=True,
        )


if __name__ == "__main__":
    main()
