"""Weight changes D that keep the leading singular triplets (U_h, s_h, V_h) of a matrix W.

``two_sided`` keeps all of D out of both sides, U_h^T D = 0 and D V_h = 0: then W V_h = U_h S_h and
U_h^T W = S_h V_h^T go on to hold, the output for an input in span(V_h) stays as it is, and so do
every output's components along U_h. ``left`` and ``right`` keep one side each. ``block`` takes out
U_h U_h^T D V_h V_h^T alone: that is the formula in print, and protects neither side.

Three parametrisations, a class each. All learn from the dense gradient G of the weight and leave an
ordinary dense weight behind: nothing of them is in the network, which runs at its own speed.
"""

from collections.abc import Callable
from copy import copy
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from cl_bench.subspace.linear_maps import LinearMap
from cl_bench.subspace.rows import cut_rows, own_rows, summed
from cl_bench.subspace.spectrum import Split

Kind = Literal["two_sided", "block", "left", "right"]
Parametrisation = Literal["projected_param", "dense_projected", "factored"]


class Restriction:
    """The orthogonal projector Pi onto the admissible changes of one matrix, and coordinates there.

    A side that is restricted and short is written in the complement's basis, which makes the core
    B smaller; a long one is projected, X - U_h (U_h^T X). So Pi is never a matrix of its own.

    Args:
        split: of W (n, m).
        kind: which changes are admissible.

    Attributes:
        core: shape of B. With ``two_sided`` (n, m - k) for n > m, (n - k, m) for n < m and
            (n - k, m - k) for square matrices.
        free: dimensions of the space of admissible changes.
    """

    def __init__(self, split: Split, kind: Kind) -> None:
        self.split = split
        self.kind = kind
        n, m = split.shape
        self._left, self._right = kind in ("two_sided", "left"), kind in ("two_sided", "right")
        self._cut_left, self._cut_right = self._left and n <= m, self._right and m <= n
        k = split.k
        self.core = (n - k * self._cut_left, m - k * self._cut_right)
        self.free = (
            n * m - k * k if kind == "block" else (n - k * self._left) * (m - k * self._right)
        )
        self._weight: Tensor | None = None

    def on_rows(self, weight: Tensor) -> "Restriction":
        """Pi for processes that share out ``weight``: from its rows of D each gets those of Pi(D).

        Left singular vectors are those of process 0.
        """
        own, s = copy(self), self.split
        U_l = cut_rows(s.U_l, weight) if s.U_l is not None and self._cut_left else None
        own.split = Split(s.values, cut_rows(s.U_h, weight), s.V_h, U_l, s.V_l)
        own._weight = weight
        return own

    def _over_rows(self, part: Tensor) -> Tensor:
        """The sum over all rows of W, from that over the rows that this process holds."""
        return part if self._weight is None else summed(part, self._weight)

    def reduce(self, G: Tensor) -> Tensor:
        """The gradient of B, from G (n, m): two-sided, P_U G V_l, U_l^T G P_V or U_l^T G V_l."""
        s = self.split
        if self.kind == "block":
            return self._outside_block(G)
        X = G
        if self._cut_left:
            assert s.U_l is not None
            X = s.U_l.t() @ X
        if self._cut_right:
            assert s.V_l is not None
            X = X @ s.V_l
        return self._outside_long(X)

    def expand(self, B: Tensor, onto: Tensor, out: Tensor | None = None) -> Tensor:
        """``onto`` + D with D (n, m) the change that B stands for; exactly admissible for any B.

        Two-sided, D is P_U B V_l^T, U_l B P_V or U_l B V_l^T.
        """
        s = self.split
        if self.kind == "block":
            return torch.add(onto, self._outside_block(B), out=out)
        X = self._outside_long(B)
        if self._cut_left and self._cut_right:
            assert s.U_l is not None
            X = s.U_l @ X
        if self._cut_right:
            assert s.V_l is not None
            return torch.addmm(onto, X, s.V_l.t(), out=out)
        if self._cut_left:
            assert s.U_l is not None
            return torch.addmm(onto, s.U_l, X, out=out)
        return torch.add(onto, X, out=out)

    def __call__(self, D: Tensor) -> Tensor:
        """Pi(D) (n, m)."""
        s = self.split
        if self.kind == "block":
            return self._outside_block(D)
        if self._left:
            D = _without(s.U_h, s.U_l if self._cut_left else None, D, self._over_rows)
        if self._right:
            D = _without(s.V_h, s.V_l if self._cut_right else None, D.t()).t()
        return D

    def _outside_long(self, X: Tensor) -> Tensor:
        s = self.split
        if self._left and not self._cut_left:
            X = torch.addmm(X, s.U_h, s.U_h.t() @ X, alpha=-1)
        if self._right and not self._cut_right:
            X = torch.addmm(X, X @ s.V_h, s.V_h.t(), alpha=-1)
        return X

    def _outside_block(self, X: Tensor) -> Tensor:
        s = self.split
        core = self._over_rows(s.U_h.t() @ X @ s.V_h)
        return torch.addmm(X, s.U_h @ core, s.V_h.t(), alpha=-1)


def _without(
    high: Tensor,
    low: Tensor | None,
    X: Tensor,
    over_rows: Callable[[Tensor], Tensor] = lambda part: part,
) -> Tensor:
    """X without its part in span(``high``); through the complement where that is smaller."""
    if low is not None and low.shape[1] < high.shape[1]:
        return low @ over_rows(low.t() @ X)
    return torch.addmm(X, high, over_rows(high.t() @ X), alpha=-1)


class RestrictedUpdate(Protocol):
    """What a weight is learned through while its leading triplets are kept."""

    restriction: Restriction

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer steps; not the weight itself, unless it is the weight."""

    def pull_back(self) -> None:
        """From the weight's accumulated gradient to the parameters' gradients.

        Where these are not the weight, the caller takes its gradient away: no optimizer is to step
        it, and one weight may hold several experts' matrices.
        """

    def push_forward(self) -> None:
        """From the parameters, which have just moved, to the weight."""


class CoreUpdate:
    """W = W_0 + Pi(B): a core B trained freely, which leads out of the admissible space nowhere.

    By the chain rule the gradient of B is that of W, reduced. What an optimizer, momentum, Adam's
    preconditioner or weight decay does to B, Pi takes out again when W is computed, once an
    optimizer step.

    Args:
        layer: whose matrix is meant.
        restriction: Pi.
        start: W_0 (n, m).
    """

    def __init__(self, layer: LinearMap, restriction: Restriction, start: Tensor) -> None:
        self.layer = layer
        self.restriction = restriction
        dtype = torch.promote_types(start.dtype, torch.float32)
        self.start = start.to(dtype)  # half precision would swallow small steps
        self.B = nn.Parameter(torch.zeros(restriction.core, dtype=dtype, device=start.device))

    def parameters(self) -> list[nn.Parameter]:
        """B."""
        return [self.B]

    def pull_back(self) -> None:
        """The gradient of B: Pi(G) in its coordinates."""
        self.take(_gradient(self.layer))

    def take(self, G: Tensor | None) -> None:
        """The same from G (n, m), the weight's gradient."""
        self.B.grad = None if G is None else self.restriction.reduce(G.to(self.B.dtype))

    @torch.no_grad()
    def made(self) -> Tensor:
        """W_0 + Pi(B)."""
        return self.restriction.expand(self.B.detach(), self.start)

    @torch.no_grad()
    def push_forward(self) -> None:
        """W <- W_0 + Pi(B)."""
        layer = self.layer
        W = layer.matrix(layer.weight.detach(), None)
        direct = W.dtype == self.B.dtype
        made = self.restriction.expand(self.B.detach(), self.start, out=W if direct else None)
        layer.store(made, layer.weight.detach(), None)


class StepUpdate:
    """W itself is trained: G <- Pi(G) before the step, W <- W_old + Pi(W_new - W_old) after it.

    Without the second, what the optimizer makes of a projected gradient leaks.

    Where processes share the weight out (FSDP2), each projects its own rows, and they add up what
    left projections need of all rows: a matrix (k, m) or smaller.

    Args:
        layer: whose matrix is meant.
        restriction: Pi.

    Raises:
        ValueError: the weight is in half precision, which swallows small steps.
    """

    def __init__(self, layer: LinearMap, restriction: Restriction) -> None:
        if layer.weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"layer {layer.name!r} is of {layer.weight.dtype}, not float32")
        self.layer = layer
        self.restriction = restriction.on_rows(layer.weight)
        self._before: Tensor | None = None

    def parameters(self) -> list[nn.Parameter]:
        """W."""
        return [self.layer.weight]

    def pull_back(self) -> None:
        """G <- Pi(G)."""
        layer, self._before = self.layer, None
        if layer.weight.grad is not None:
            gradient = own_rows(layer.weight.grad)
            layer.store(self.restriction(layer.matrix(gradient, None)), gradient, None)
            self._before = layer.matrix(own_rows(layer.weight.detach()), None).clone()

    @torch.no_grad()
    def push_forward(self) -> None:
        """W <- W_old + Pi(W_new - W_old)."""
        if self._before is None:
            return
        layer, before = self.layer, self._before
        weight = own_rows(layer.weight.detach())
        W = layer.matrix(weight, None)
        layer.store(before + self.restriction(W - before), weight, None)
        self._before = None


class FactorUpdate:
    """W = U_h S_h V_h^T + U_l diag(s_l) V_l^T with trained low factors, as in the authors' code.

    Their gradients are those of a factorised layer, by the chain rule through W:
    dU_l = G V_l diag(s_l), ds_l = diag(U_l^T G V_l), dV_l = G^T U_l diag(s_l). Those of U_l and V_l
    are projected, and U_l and V_l themselves after the step. Directions move at the square of their
    singular value, so learning rates do not carry over to the other parametrisations.

    Args:
        layer: whose matrix is meant.
        restriction: two-sided, left or right, with both U_l and V_l.
        start: W_0 (n, m).
    """

    def __init__(self, layer: LinearMap, restriction: Restriction, start: Tensor) -> None:
        split = restriction.split
        assert split.U_l is not None
        assert split.V_l is not None
        assert restriction.kind != "block", "no projection of the factors keeps a block"
        self.layer = layer
        self.restriction = restriction
        self.U_l = nn.Parameter(split.U_l.clone())
        self.s_l = nn.Parameter(split.values[split.k :].to(split.U_l.dtype, copy=True))
        self.V_l = nn.Parameter(split.V_l.clone())
        self._high = start.to(split.U_l.dtype) - self._low()

    def _low(self) -> Tensor:
        return (self.U_l.detach() * self.s_l.detach()) @ self.V_l.detach().t()

    def parameters(self) -> list[nn.Parameter]:
        """U_l, s_l and V_l."""
        return [self.U_l, self.s_l, self.V_l]

    def pull_back(self) -> None:
        """The factors' gradients, projected."""
        self.take(_gradient(self.layer))

    @torch.no_grad()
    def take(self, G: Tensor | None) -> None:
        """The same from G (n, m), the weight's gradient."""
        if G is None:
            self.U_l.grad = self.s_l.grad = self.V_l.grad = None
            return
        G = G.to(self.U_l.dtype)
        GV = G @ self.V_l
        self.s_l.grad = (self.U_l * GV).sum(0)
        dU, dV = GV * self.s_l, (G.t() @ self.U_l) * self.s_l
        self.U_l.grad, self.V_l.grad = self._projected(dU, dV)

    @torch.no_grad()
    def made(self) -> Tensor:
        """U_l <- P_U U_l, V_l <- P_V V_l, and W from them."""
        U, V = self._projected(self.U_l, self.V_l)
        self.U_l.copy_(U)
        self.V_l.copy_(V)
        return torch.addmm(self._high, self.U_l * self.s_l, self.V_l.t())

    @torch.no_grad()
    def push_forward(self) -> None:
        """U_l <- P_U U_l, V_l <- P_V V_l, and W from them."""
        layer = self.layer
        layer.store(self.made(), layer.weight.detach(), None)

    def _projected(self, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        split, kind = self.restriction.split, self.restriction.kind
        if kind != "right":
            U = torch.addmm(U, split.U_h, split.U_h.t() @ U, alpha=-1)
        if kind != "left":
            V = torch.addmm(V, split.V_h, split.V_h.t() @ V, alpha=-1)
        return U, V


def restricted_update(
    layer: LinearMap, restriction: Restriction, start: Tensor, kind: Parametrisation
) -> RestrictedUpdate:
    """What ``layer`` learns through: a core, factors, or steps that are projected.

    Args:
        layer: whose matrix is meant.
        restriction: Pi.
        start: W_0 (n, m).
        kind: of the three.

    Raises:
        ValueError: the layer's weight cannot learn so.
    """
    if kind == "dense_projected":
        return StepUpdate(layer, restriction)
    made = CoreUpdate if kind == "projected_param" else FactorUpdate
    return made(layer, restriction, start)


def _gradient(layer: LinearMap) -> Tensor | None:
    """The weight's gradient as a matrix."""
    G = layer.weight.grad
    return None if G is None else layer.matrix(G, None)
