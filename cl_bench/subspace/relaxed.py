"""Learning inside a subspace through one small matrix: W moves there as W B (S - I) B^T.

B (d x q) is orthonormal, S (q x q) starts at I, and W B is that of W when B was chosen. The
layer's weight is the effective one, W_eff = W + W B (S - I) B^T, all the time, so the network runs
as it is, and no product enters its passes: with G = dL/dW_eff the chain rule gives
dL/dS = (W B)^T (G B), once a step, and a step of S moves the weight by W B (S_new - S_old) B^T.

Where an optimizer's step is linear in the gradients, S and the weight make one step: then
W B (dL/dS) B^T in the weight's gradient carries it along, with fewer products than to follow. A
norm that gradients are clipped by then counts what is carried as well.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cl_bench.subspace.basis import complement
from cl_bench.subspace.linear_maps import LinearMap
from cl_bench.subspace.rows import cut_rows, join_rows, own_rows, summed


class RelaxedSpace:
    """B, W B and S - I of one layer.

    Args:
        layer: whose matrix W (o, d) is meant.
        basis: B (d, q), orthonormal.
        image: W B (o, q), a constant; the rows that this process holds.
        change: S - I (q, q), as far as the weight has followed it already.
        frozen: M (d, k), what is taken out of the weight's gradient; B where none is given.
        carried: whether the weight's gradient carries S's.

    Attributes:
        change: S - I, a parameter.
    """

    def __init__(
        self,
        layer: LinearMap,
        basis: Tensor,
        image: Tensor,
        change: Tensor,
        frozen: Tensor | None = None,
        carried: bool = False,
    ) -> None:
        self.layer = layer
        self.weight, self.bias = layer.weight, layer.bias if layer.augmented else None
        self.basis, self.image = basis.detach(), image.detach()
        self.change = nn.Parameter(change.detach().clone())
        self.frozen = self.basis if frozen is None else frozen
        self.carried = carried
        weight = own_rows(self.weight.detach())
        self._settle(weight)
        self._look_at(weight)

    def stay_with_layer(self) -> None:
        """Be where the layer's weight is."""
        weight = own_rows(self.weight.detach())
        if self.basis.device != weight.device or self.basis.dtype != weight.dtype:
            self._settle(weight)
        self._look_at(weight)

    def _settle(self, weight: Tensor) -> None:
        self.basis = self.basis.to(weight).contiguous()
        self.image = self.image.to(weight).contiguous()
        self.change.data = self.change.data.to(weight)
        # What runs in every step uses views made once, and has no autograd to switch off.
        self._value = self.change.detach()
        self._basis_t, self._image_t = self.basis.t(), self.image.t()
        self._followed = self.image @ self._value
        # Multiplied with is what goes, M, or what stays, N: whichever has fewer columns.
        d, k = self.frozen.shape
        self._stays = 2 * k > d
        other = complement(self.frozen.double()) if self._stays else self.frozen
        self._both = torch.cat([self.basis, other.to(weight)], dim=1)
        self._both_t = self._both.t()
        self._parts = weight.new_empty(len(self.image), self._both.shape[1])
        self._along = self._parts[:, : self.basis.shape[1]]
        self._carrier = self.image if self._stays else -self.image

    def _look_at(self, weight: Tensor) -> None:
        self._whole = (
            self.layer.is_one_tensor
            and not isinstance(self.weight, DTensor)
            and weight.is_contiguous()
        )
        self._matrix = weight.view(len(weight), -1) if self._whole else weight

    def take(self, strength: float) -> None:
        """dL/dS = (W B)^T G B + 2 strength (S - I); then G <- G - (G M) M^T [+ W B dL/dS B^T]."""
        gradient = self.weight.grad
        if gradient is None:
            self.change.grad = None
            return
        if self._whole and gradient.is_contiguous():
            self._take_from(gradient if gradient.dim() == 2 else gradient.flatten(1), strength)
            return
        gradient, bias = own_rows(gradient), None
        if self.bias is not None and self.bias.grad is not None:
            bias = own_rows(self.bias.grad)
        G = self.layer.matrix(gradient, bias)
        self._take_from(G, strength)
        self.layer.store(G, gradient, bias)

    def _take_from(self, G: Tensor, strength: float) -> None:
        torch.mm(G, self._both, out=self._parts)  # [G B, G M] or [G B, G N]
        if isinstance(self.weight, DTensor):
            learned = summed(self._image_t @ self._along, self.weight)
            learned.add_(self._value, alpha=2 * strength)
        else:
            learned = torch.addmm(self._value, self._image_t, self._along, beta=2 * strength)
        self.change.grad = learned
        if self.carried:
            torch.mm(self._carrier, learned, out=self._along)
        else:
            self._along.zero_()
        if self._stays:
            torch.mm(self._parts, self._both_t, out=G)
        else:
            G.addmm_(self._parts, self._both_t, alpha=-1)

    def follow(self) -> None:
        """W_eff <- W_eff + W B (S_new - S_old) B^T, for steps of S that nothing has carried."""
        image = self.image @ self._value
        moved, self._followed = image - self._followed, image
        if self._whole:
            self._matrix.addmm_(moved, self._basis_t)
            return
        weight = own_rows(self.weight.detach())
        bias = None if self.bias is None else own_rows(self.bias.detach())
        W = self.layer.matrix(weight, bias).addmm_(moved, self._basis_t)
        self.layer.store(W, weight, bias)


class RelaxedSpaces:
    """A relaxed space for each of some layers, growing while a task is learned.

    Args:
        layers: those that may have one.
        frozen: M (d, k) by name, for those whose gradients :meth:`take` projects by I - M M^T;
            from others it takes what lies in span(B).
        carried: whether gradients carry the steps of S, which is right where a step is linear in
            them, with one rate for S and the weights. Otherwise call :meth:`follow`.
    """

    def __init__(
        self,
        layers: Sequence[LinearMap],
        frozen: Mapping[str, Tensor] | None = None,
        carried: bool = False,
    ) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self.frozen = dict(frozen or {})
        self.carried = carried
        self.spaces: dict[str, RelaxedSpace] = {}

    def grow(self, name: str, basis: Tensor) -> None:
        """Append ``basis`` (d, q), orthonormal to what is there: S keeps its entries, I is new."""
        layer = self.layers[name]
        bias = own_rows(layer.bias.detach()) if layer.augmented and layer.bias is not None else None
        W = layer.matrix(own_rows(layer.weight.detach()), bias)
        basis, q = basis.to(W), basis.shape[1]
        image, change = W @ basis, W.new_zeros(q, q)
        if name in self.spaces:
            old = self.spaces[name]
            basis = torch.cat([old.basis, basis], dim=1)
            image = torch.cat([old.image, image], dim=1)
            change = F.pad(old.change.detach(), (0, q, 0, q))
        self._put(name, basis, image, change)

    def _put(self, name: str, basis: Tensor, image: Tensor, change: Tensor) -> None:
        self.spaces[name] = RelaxedSpace(
            self.layers[name], basis, image, change, self.frozen.get(name), self.carried
        )

    def parameters(self) -> list[nn.Parameter]:
        """S - I of every space, where the layers' weights are."""
        spaces = [self.spaces[name] for name in self.layers if name in self.spaces]
        for space in spaces:
            space.stay_with_layer()
        return [space.change for space in spaces]

    def take(self, strength: float) -> None:
        """Gradients are ready: what lies in a relaxed space trains its S.

        Args:
            strength: of a penalty ||S - I||_F^2 on every S.
        """
        for space in self.spaces.values():
            space.take(strength)

    def follow(self) -> None:
        """S has moved: the weights follow, where their gradients have not carried it."""
        if not self.carried:
            for space in self.spaces.values():
                space.follow()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """B, W B and S - I, by layer."""
        return {
            name: {
                "basis": s.basis,
                "image": join_rows(s.image, s.layer.weight, s.layer.out_features),
                "change": s.change.detach().clone(),
            }
            for name, s in self.spaces.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, for weights that belong to it."""
        self.spaces = {}
        for name, parts in state.items():
            image = cut_rows(parts["image"], self.layers[name].weight)
            self._put(name, parts["basis"], image, parts["change"])
