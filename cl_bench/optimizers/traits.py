"""What the rest must know of an optimizer before it trains: the one table that says it."""

from dataclasses import dataclass

from torch.optim import Optimizer

from cl_bench.optimizers.wrapped import Wrapped


@dataclass(frozen=True)
class Traits:
    """Of a rule.

    Attributes:
        inside: its state dict holds all that its next step depends on.
        carried: all of that lies in the state of its parameters, so that it can go on in the
            optimizer of the next task.
        whole: it needs whole weights, not the rows that a process holds.
        draws: from global generators, which differ between processes.
        matrices: it takes matrices alone, no kernels of convolutions.
    """

    inside: bool = True
    carried: bool = True
    whole: bool = False
    draws: bool = False
    matrices: bool = False


_COUNTS = {"carried": False}
_MATRIX = {"whole": True}

TABLE = {
    "torch.Adafactor": Traits(whole=True),
    "torch.Muon": Traits(whole=True, matrices=True),
    "cl_bench.LMO": Traits(**_MATRIX),
    "cl_bench.AdaMuon": Traits(**_MATRIX),
    "cl_bench.Dion": Traits(**_MATRIX, draws=True),
    "cl_bench.RandomScaling": Traits(draws=True),
    "cl_bench.OnlineSubspace": Traits(**_MATRIX),
    "cl_bench.DCTAdam": Traits(**_MATRIX),
    "cl_bench.Lookahead": Traits(),
    "cl_bench.ByRole": Traits(),
    "pytorch_optimizer.Lion": Traits(),
    "pytorch_optimizer.AdaMuon": Traits(**_MATRIX, **_COUNTS),
    "pytorch_optimizer.NorMuon": Traits(**_MATRIX, **_COUNTS),
    "pytorch_optimizer.Conda": Traits(**_MATRIX, **_COUNTS, inside=False, matrices=True),
    "pytorch_optimizer.GaLore": Traits(**_MATRIX, **_COUNTS, inside=False, matrices=True),
    "pytorch_optimizer.SOAP": Traits(**_MATRIX, **_COUNTS),
    "pytorch_optimizer.Shampoo": Traits(**_MATRIX, **_COUNTS, matrices=True),
    "pytorch_optimizer.ScalableShampoo": Traits(**_MATRIX, **_COUNTS, inside=False),
    "pytorch_optimizer.Kron": Traits(**_MATRIX, **_COUNTS, inside=False, draws=True),
}
"""By package and class. Others of torch go by the defaults, others of ``pytorch_optimizer`` by
:data:`UNKNOWN`."""

UNKNOWN = Traits(inside=False, carried=False, whole=True, draws=True, matrices=True)


def parts(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizer, and those inside it."""
    inside = optimizer.inner if isinstance(optimizer, Wrapped) else []
    return [optimizer, *(part for one in inside for part in parts(one))]


def traits_of(optimizer: Optimizer) -> Traits:
    """Of the optimizer and all inside it together."""
    found = []
    for part in parts(optimizer):
        package = type(part).__module__.partition(".")[0]
        default = UNKNOWN if package == "pytorch_optimizer" else Traits()
        found.append(TABLE.get(f"{package}.{type(part).__name__}", default))
    return Traits(
        inside=all(t.inside for t in found),
        carried=all(t.carried for t in found),
        whole=any(t.whole for t in found),
        draws=any(t.draws for t in found),
        matrices=any(t.matrices for t in found),
    )
