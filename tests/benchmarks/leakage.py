"""How much of a weight's change an optimizer puts into a protected subspace: ``make leakage``.

    python tests/benchmarks/leakage.py                        # prints the figures
    python tests/benchmarks/leakage.py --results docs/results  # writes leakage.json

Two tables. ``rules``: sixty steps of every rule on one matrix, whose gradients never point into the
protected inputs S, in float32 and with weights in bfloat16; |dW S| / |dW|, without and with the
projection of every step, and the same for protected outputs. ``strategies``: a small network that
learns a second task under each projection strategy, with eight optimizers: how much of the change
of its layers lies where old inputs are, and what it would be with gradients projected alone.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.util
import itertools
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Muon, Optimizer

from cl_bench.cli.folders import conf_directory
from cl_bench.cli.optimizers import build_optimizer
from cl_bench.experiment import TrainLoader
from cl_bench.optimizers.adamuon import AdaMuon
from cl_bench.optimizers.dct_adam import DCTAdam
from cl_bench.optimizers.dion import Dion
from cl_bench.optimizers.lmo import LMO
from cl_bench.optimizers.lookahead import Lookahead
from cl_bench.optimizers.online_subspace import OnlineSubspace
from cl_bench.optimizers.random_scaling import RandomScaling
from cl_bench.strategies.projection.adam_nscl import AdamNSCL
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.projection.ogd import OGD
from cl_bench.strategies.projection.rogo import ROGO
from cl_bench.strategies.projection.sgp import SGP
from cl_bench.strategies.projection.trgp import TRGP
from cl_bench.strategies.svd.adaptive_svd import AdaptiveSVD

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
from toys import learn, make_learner, make_stream, mlp

OPTIMIZERS = conf_directory() / "optimizer"
K, STEPS, RATE = 10, 60, 1e-2
SHAPES = ((64, 32), (32, 64))

part = functools.partial
RULES: dict[str, Callable[..., Optimizer]] = {
    "SGD": SGD,
    "SGD, momentum": part(SGD, momentum=0.9),
    "SGD, momentum, decay": part(SGD, momentum=0.9, weight_decay=0.01),
    "Adam": Adam,
    "AdamW": part(AdamW, weight_decay=0.0),
    "AMSGrad": part(Adam, amsgrad=True),
    "Adafactor": Adafactor,
    "Muon (bfloat16)": part(Muon, weight_decay=0.0),
    "Newton-Schulz": part(LMO, norm="newton_schulz"),
    "spectral": part(LMO, norm="spectral"),
    "normalised SGDM, AuON": part(LMO, norm="frobenius"),
    "largest entry": part(LMO, norm="max"),
    "row": part(LMO, norm="row"),
    "column": part(LMO, norm="column"),
    "AdaMuon, sign": AdaMuon,
    "AdaMuon, no sign": part(AdaMuon, sign=False),
    "Dion": Dion,
    "random scaling": RandomScaling,
    "online subspace, SGD": part(OnlineSubspace, subspace="sgd"),
    "online subspace, AdamW": OnlineSubspace,
    "DCT-Adam": DCTAdam,
    "Lookahead (SGD)": part(Lookahead, inner=SGD),
    "Lookahead (Adam)": part(Lookahead, inner=Adam),
}
LIBRARY = {
    "Lion": ("Lion", {}),
    "NorMuon": ("NorMuon", {"nesterov": False}),
    "Conda": ("Conda", {"update_proj_gap": 20}),
    "SOAP": ("SOAP", {"weight_decay": 0.0}),
    "Shampoo": ("Shampoo", {}),
    "PSGD-Kron": ("Kron", {}),
    "GaLore": (
        "GaLore",
        {"rank": 8, "update_proj_gap": 20, "scale": 1.0, "projection_type": "std"},
    ),
}
KEEP = ("SGD", "SGD, momentum", "Newton-Schulz", "spectral", "normalised SGDM, AuON", "row", "Dion",
        "random scaling", "Lookahead (SGD)")  # fmt: skip
"""Rules that keep protected inputs by themselves."""


def rules() -> dict[str, Callable[..., Optimizer]]:
    """All that are installed."""
    found = dict(RULES)
    if importlib.util.find_spec("pytorch_optimizer"):
        import pytorch_optimizer

        for name, (kind, options) in LIBRARY.items():
            found[name] = part(getattr(pytorch_optimizer, kind), **options)
    return found


def leak(
    factory: Callable[..., Optimizer],
    shape: tuple[int, int] = SHAPES[0],
    side: str = "inputs",
    dtype: torch.dtype = torch.float32,
    step: bool = False,
    steps: int = STEPS,
) -> float:
    """|dW S| / |dW| after some steps on projected gradients; of outputs |S^T dW| / |dW|.

    Gradients are those of correlated inputs and errors, with a pull that grows with the change.

    Args:
        factory: of the optimizer.
        shape: of the matrix.
        side: what is protected.
        dtype: of the weights and gradients; the protected space is known in float64.
        step: whether the change is projected after every step too.
        steps: how many.
    """
    rng = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64)

    m, n = shape
    d = n if side == "inputs" else m
    S = torch.linalg.qr(drawn(d, K)).Q
    P = torch.eye(d, dtype=torch.float64) - S @ S.t()

    def allowed(G: Tensor) -> Tensor:
        G = G.double()
        return (G @ P if side == "inputs" else P @ G).to(dtype)

    weight = nn.Parameter((drawn(m, n) / n**0.5).to(dtype))
    begun = weight.detach().clone()
    mix_in, mix_out, goal = drawn(n, n) / n**0.5, drawn(m, m) / m**0.5, drawn(m, n)
    torch.manual_seed(0)
    needs_role = getattr(factory, "func", factory).__name__ == "NorMuon"
    group: dict[str, Any] = {"params": [weight], **({"use_muon": True} if needs_role else {})}
    optimizer = factory([group], lr=RATE)
    for _ in range(steps):
        X, D = drawn(16, n) @ mix_in, drawn(16, m) @ mix_out
        change = weight.detach().double() - begun.double()
        weight.grad = allowed(D.t() @ X / 16 + 0.1 * (change - goal))
        before = weight.detach().clone()
        optimizer.step()
        if step:
            with torch.no_grad():
                weight.copy_(before + allowed(weight - before))
    change = weight.detach().double() - begun.double()
    inside = change @ S if side == "inputs" else S.t() @ change
    return float(inside.norm() / change.norm())


# --- strategies -----------------------------------------------------------------------------------

EIGHT = ("sgd", "adamw", "adafactor", "muon", "newton_schulz", "normuon", "soap", "dion")
RATES = {"sgd": 0.05, "adafactor": 0.05}

STRATEGIES: dict[str, Callable[[], Any]] = {
    "gpm": part(GPM, threshold=0.9, samples=40),
    "sgp": part(SGP, threshold=0.9, samples=40),
    "trgp": part(TRGP, threshold=0.9, samples=40),
    "rogo": part(ROGO, threshold=0.9, samples=40, relax_samples=20),
    "adam_nscl": part(AdamNSCL, a=20.0),
    "ogd": part(OGD, samples=8),
    "adaptive_svd": part(AdaptiveSVD, start_task=1, schedule="fixed", preserve_ratio=0.5),
}


def factory_of(name: str) -> Any:
    """What makes a run's optimizers, at a rate for a network this small."""
    whole = OmegaConf.create({"optimizer": OmegaConf.load(OPTIMIZERS / f"{name}.yaml")})
    whole.optimizer.lr = RATES.get(name, 0.005)
    if name == "adamw":
        whole.optimizer.weight_decay = 0.0
    return build_optimizer(whole.optimizer).factory


def leak_under(
    strategy: Any, optimizer: Any, gradients: bool = False, dtype: torch.dtype = torch.float32
) -> float:
    """The largest share, over layers, of a second task's change that lies where it must not.

    Args:
        strategy: fresh.
        optimizer: factory of the second task's; the first learns with SGD.
        gradients: project gradients alone, whatever the optimizer makes of them.
        dtype: of weights and data.
    """
    scenario = "task" if strategy.needs.task_id_at_test else "domain"
    stream = make_stream(scenario, tasks=2, n=40)
    learner = make_learner(stream, mlp(), optimizer=part(SGD, lr=0.05)).to(dtype)
    for task in stream:
        for name, x in task.data.tensors.items():
            task.data.tensors[name] = x.to(dtype) if x.is_floating_point() else x
    learner.strategy = learner.acting = strategy
    learn(learner, strategy, stream[0], epochs=3)
    learner._optimizer_factory = optimizer
    learner.begin(stream[1], strategy)
    learner.train()
    begun = {n: p.detach().clone() for n, p in learner.named_parameters()}
    confinement = getattr(strategy, "confinement", None)
    pairs = list(confinement._projected) if confinement else []
    if gradients and confinement:
        confinement.where = "gradient"
    elif gradients:
        strategy.stepwise = False
    made = learner.configure_optimizers()
    for _ in range(4):
        for i, batch in enumerate(TrainLoader(stream[1].train, 10, 0, 1)):
            made.zero_grad()
            learner.training_step(batch, i).backward()
            strategy.constrain(learner)
            made.step()
    moved = {n: p.detach().double() - begun[n].double() for n, p in learner.named_parameters()}
    found = [
        share(moved[f"{layer.name}.weight"], null_space(projection, layer.in_features))
        for layer, projection in pairs
    ]
    if isinstance(strategy, OGD):
        names = strategy.shared(learner)
        change = torch.cat([moved[n].flatten() for n in names])
        found.append(float((strategy.active.double().t() @ change).norm() / change.norm()))
    if isinstance(strategy, AdaptiveSVD):
        for layer in strategy.layers:
            name = next(n for n, p in learner.named_parameters() if p is layer.weight)
            U, _, Vh = torch.linalg.svd(begun[name].double(), full_matrices=False)
            k = int(strategy.measured[layer.name]["rank"])
            found += [share(moved[name], Vh[:k].t()), share(moved[name].t(), U[:, :k])]
    strategy.release(learner)
    return max(found)


def null_space(projection: Any, dim: int) -> Tensor:
    """Directions that a projection leaves nothing of (d, k)."""
    eye = torch.eye(dim, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(projection.to(eye)(eye))
    return vectors[:, values.abs() < 1e-6]


def share(change: Tensor, S: Tensor) -> float:
    """|dW S| / |dW|."""
    return float((change @ S).norm() / change.norm())


def table_of_strategies() -> Iterator[dict[str, Any]]:
    """What is left of the leak, and what it would be with gradients projected alone."""
    installed = importlib.util.find_spec("pytorch_optimizer")
    for name, optimizer in itertools.product(STRATEGIES, EIGHT):
        if optimizer in ("normuon", "soap") and not installed:
            continue
        row = {"table": "strategies", "strategy": name, "optimizer": optimizer}
        row["leak"] = leak_under(STRATEGIES[name](), factory_of(optimizer))
        if name != "adaptive_svd":  # which knows no other way
            row["gradients"] = leak_under(STRATEGIES[name](), factory_of(optimizer), True)
        yield row


def table_of_rules() -> Iterator[dict[str, Any]]:
    """Every rule, on its own."""
    for name, factory in rules().items():
        row: dict[str, Any] = {"table": "rules", "rule": name}
        for shape in SHAPES:
            where = "x".join(map(str, shape))
            row[f"in_{where}"] = leak(factory, shape)
            row[f"out_{where}"] = leak(factory, shape, "outputs")
        row["step"] = max(leak(factory, shape, step=True) for shape in SHAPES)
        for key, step in (("bf16", False), ("bf16_step", True)):
            with contextlib.suppress(RuntimeError):  # LAPACK has no routines for it
                row[key] = leak(factory, dtype=torch.bfloat16, step=step)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    rows = []
    for row in (*table_of_rules(), *table_of_strategies()):
        rows.append({k: float(f"{v:.2g}") if isinstance(v, float) else v for k, v in row.items()})
        print(" ".join(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
    if arguments.results is None:
        return
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    whole = {
        "what": " ".join(str(__doc__).partition("Two tables. ")[2].split()),
        "command": "python tests/benchmarks/leakage.py --results docs/results",
        "commit": commit,
        "seeds": [0],
        "machine": f"one thread, torch {torch.__version__}, Python {platform.python_version()}",
        "date": f"{datetime.date.today()}",
        "values": rows,
    }
    (arguments.results / "leakage.json").write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
