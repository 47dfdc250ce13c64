"""Gates over the units of some layers: sigmoid(s e), learned while s grows, and what they close."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

STEEPEST, LARGEST = 50.0, 6.0
"""Of |s e| where gradients are made steady, and of |e|: what the authors of HAT limit them to."""


def steepness(done: float, last: float) -> float:
    """The s of gates that close while they learn: from 1 / last to last, ``done`` from 0 to 1."""
    return 1 / last + (last - 1 / last) * min(max(done, 0.0), 1.0)


class Gates(nn.Module):
    """One e for every unit of each layer, standard normal at first.

    Args:
        units: of every layer.
    """

    def __init__(self, units: Iterable[int]) -> None:
        super().__init__()
        self.e = nn.ParameterList(nn.Parameter(torch.randn(n)) for n in units)

    def mask(self, i: int, s: float) -> Tensor:
        """sigmoid(s e) of the i-th layer: (units,)."""
        return torch.sigmoid(s * self.e[i])

    def joined(self, s: float, owned: Sequence[Tensor]) -> list[Tensor]:
        """The larger of ``owned``, if there is any, and the masks, by layer."""
        masks = [self.mask(i, s).detach() for i in range(len(self.e))]
        return [torch.maximum(a, o.to(a)) for a, o in zip(masks, owned or masks, strict=True)]

    def price(self, s: float, owned: Sequence[Tensor]) -> Tensor:
        """Share of what is not owned that the gates let through: sum a (1 - o) / sum (1 - o).

        Args:
            s: steepness.
            owned: o of every layer, (units,) in [0, 1]; none means 0 everywhere.
        """
        masks = [self.mask(i, s) for i in range(len(self.e))]
        free = [1 - o.to(masks[0]) for o in owned] or [torch.ones_like(a) for a in masks]
        asked = torch.stack([(a * f).sum() for a, f in zip(masks, free, strict=True)]).sum()
        return asked / torch.stack([f.sum() for f in free]).sum().clamp_min(1e-9)

    def make_steady(self, s: float, last: float) -> None:
        """Rescale gradients to what they were if the steepness stayed at 1, times ``last``.

        By last / s * (cosh(s e) + 1) / (cosh(e) + 1): the derivative of sigmoid(s e) by e is
        s / (2 (cosh(s e) + 1)).
        """
        for e in self.e:
            if e.grad is not None:
                steep = (s * e.detach()).clamp(-STEEPEST, STEEPEST)
                e.grad.mul_(last / s * (steep.cosh() + 1) / (e.detach().cosh() + 1))

    def limit(self) -> None:
        """Keep every e where its sigmoid still has a gradient."""
        for e in self.e:
            e.detach().clamp_(-LARGEST, LARGEST)


class ClosedWeights:
    """Parameters that may change in part only, or not at all.

    Args:
        taken: of every parameter, in its shape or broadcast, how much is closed, in [0, 1].
        stepwise: weaken steps, and not gradients: whatever momentum, adaptive rates and weight
            decay make of them. What is closed wholly stays to the bit either way.
    """

    def __init__(self, taken: Mapping[nn.Parameter, Tensor], stepwise: bool) -> None:
        self.taken, self.stepwise = taken, stepwise
        self._before: dict[nn.Parameter, Tensor] = {}

    def constrain(self) -> None:
        """Gradients are ready: weaken them, or remember the weights."""
        self._before = {}
        for p, taken in self.taken.items():
            if self.stepwise:
                self._before[p] = p.detach().clone()
            elif p.grad is not None:
                p.grad.mul_(1 - taken.to(p))

    def after_step(self) -> None:
        """The weights have moved."""
        for p, before in self._before.items():
            p.detach().copy_(torch.lerp(before, p.detach(), 1 - self.taken[p].to(p)))
