"""InfLoRA and KeepLoRA beside the functions that their authors published, on random matrices.

    python tests/benchmarks/low_rank_oracles.py --clones /path/to/clones

That folder holds git clones, bare or not, of liangyanshuo/InfLoRA and MaolinLuo/KeepLoRA, each
under its own name. Single functions are taken from their HEAD and run, without the packages that
they come from; nothing holds them back, so look at what you clone. Prints a line of JSON a
comparison: the largest relative difference (Frobenius norms) of projections, and of the change that
a pair begins with.
"""

import argparse
import ast
import contextlib
import io
import json
import logging
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl_bench.strategies.lowrank.inflora import grown
from cl_bench.strategies.lowrank.keeplora import beside
from cl_bench.subspace import Moments


def source(clone: Path, path: str) -> str:
    """A file of the clone's HEAD."""
    return subprocess.run(
        ["git", "-C", str(clone), "show", f"HEAD:{path}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def function(text: str, name: str, **scope: Any) -> Any:
    """One function of a file."""
    (found,) = [
        n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef) and n.name == name
    ]
    exec(compile(ast.Module([found], []), name, "exec"), scope)
    return scope[name]


def moments(rows: Tensor) -> Moments:
    """Of the rows (n, d)."""
    found = Moments(rows.shape[1])
    found.add(rows)
    return found


def apart(found: Tensor, wanted: Tensor) -> float:
    """Relative difference."""
    return float((found.double() - wanted).norm() / wanted.norm())


def inflora(clones: Path, seed: int) -> float:
    """M of six tasks, in both forms of DualGPM."""
    theirs = function(
        source(clones / "InfLoRA", "methods/inflora.py"),
        "update_DualGPM",
        np=np,
        torch=torch,
        logging=logging,
    )
    gaps = []
    for d in (12, 20):
        state = SimpleNamespace(lame=1.0, lamb=0.9, total_sessions=6, feature_list=[])
        state.project_type, M = [], None
        for t in range(6):
            state._cur_task = t
            X = np.random.default_rng([seed, t]).standard_normal((d, 5))
            C = X @ X.T + 1e-2 * np.eye(d)
            with contextlib.redirect_stdout(io.StringIO()):
                theirs(state, [C.copy()])
            M = grown(M, moments(torch.from_numpy(C)), 0.9 + 0.1 * t / 6)
            P = torch.from_numpy(state.feature_list[0] @ state.feature_list[0].T)
            P = P if state.project_type[0] == "remove" else torch.eye(d).double() - P
            gaps.append(apart(P, M @ M.t()))
        assert state.project_type == ["retain"]
    return max(gaps)


def keeplora(clones: Path, seed: int) -> tuple[float, float]:
    """M of a weight and of three tasks' features after it; the change a pair begins with."""
    clone, scope = clones / "KeepLoRA", {"torch": torch}
    grow = function(source(clone, "MTIL/model/prin_subspace.py"), "_update_prin_subspace", **scope)
    start = function(source(clone, "MTIL/trainer/trainer.py"), "out_proj_weight_process", **scope)
    rng = torch.Generator().manual_seed(seed)
    told, kept, d, gaps = SimpleNamespace(log_txt=lambda line: None), [], 24, []
    W = torch.randn(d, d, generator=rng) @ torch.diag(torch.linspace(3, 0.1, d))
    # Of W^T: which side its singular vectors are taken from is where their two programs differ.
    grow(told, [W.t()], kept, 0.5)
    M = grown(None, moments(W), 0.5)
    gaps.append(apart(kept[0] @ kept[0].t(), M @ M.t()))
    for _ in range(3):
        X = torch.randn(10, 4, generator=rng) @ torch.randn(4, d, generator=rng)
        X = X + 0.3 * torch.randn(10, d, generator=rng)
        grow(told, [X.t()], kept, 0.9)
        M = grown(M, moments(X), 0.9)
        gaps.append(apart(kept[0] @ kept[0].t(), M @ M.t()))
    G = torch.randn(d, 8, generator=rng) @ torch.randn(8, d, generator=rng)
    A, B = start(None, G, d, 3, (M @ M.t()).float())
    pair = beside(G, M, 3)
    assert pair.B is not None
    return max(gaps), apart((A @ B).t(), pair.B @ pair.A)


def main() -> None:
    """Print every comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--clones", type=Path, required=True)
    clones, seeds = parser.parse_args().clones, (0, 1, 2)
    both = [keeplora(clones, seed) for seed in seeds]
    for strategy, repository, what, gaps in (
        ("inflora", "InfLoRA", "`update_DualGPM`, 6 tasks", [inflora(clones, s) for s in seeds]),
        ("keeplora", "KeepLoRA", "`_update_prin_subspace`, a weight and 3 tasks, float32", None),
        ("keeplora", "KeepLoRA", "`out_proj_weight_process`, float32", None),
    ):
        gaps = gaps or [pair["out_proj" in what] for pair in both]
        head = ["git", "-C", str(clones / repository), "rev-parse", "--short=7", "HEAD"]
        at = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
        row = {"strategy": strategy, "repository": repository, "at": at, "what": what}
        print(json.dumps({**row, "gap": float(f"{max(gaps):.1e}")}))


if __name__ == "__main__":
    main()
