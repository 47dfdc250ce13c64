"""Learning inside a subspace through one small matrix: W moves there as W B (S - I) B^T.

B (d x q) is orthonormal, S (q x q) starts at I, and W B is W's as it was when B was found. The
layer's weight is the effective one, W_eff = W + W B (S - I) B^T, all the time, so the network runs
as it is, and no product enters its passes: with G = dL/dW_eff the chain rule gives
dL/dS = (W B)^T (G B), once a step, and a step of S moves the weight by W B (S_new - S_old) B^T.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cl_bench.subspace.linear_maps import LinearMap, cut_rows, join_rows, own_rows, summed


class RelaxedSpace:
    """B, W B and S - I of one layer.

    Args:
        layer: whose matrix W (o, d) is meant.
        basis: B (d, q), orthonormal.
        image: W B (o, q), a constant; the rows that this process holds.
        change: S - I (q, q), as far as the weight has followed it already.

    Attributes:
        change: S - I, a parameter.
    """

    def __init__(self, layer: LinearMap, basis: Tensor, image: Tensor, change: Tensor) -> None:
        self.layer = layer
        self.weight, self.bias = layer.weight, layer.bias if layer.augmented else None
        self.basis, self.image = basis.detach(), image.detach()
        self.change = nn.Parameter(change.detach().clone())
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

    def _look_at(self, weight: Tensor) -> None:
        self._whole = (
            self.layer.is_one_tensor
            and not isinstance(self.weight, DTensor)
            and weight.is_contiguous()
        )
        self._matrix = weight.view(len(weight), -1) if self._whole else weight

    def take(self, strength: float, clear: bool = True) -> None:
        """dL/dS = (W B)^T G B + 2 strength (S - I); ``clear`` takes from G what is in span(B)."""
        gradient = self.weight.grad
        if gradient is None:
            self.change.grad = None
            return
        bias = None
        if self._whole:
            G = gradient.flatten(1)
        else:
            gradient = own_rows(gradient)
            if self.bias is not None and self.bias.grad is not None:
                bias = own_rows(self.bias.grad)
            G = self.layer.matrix(gradient, bias)
        along = G @ self.basis
        if isinstance(self.weight, DTensor):
            learned = summed(self._image_t @ along, self.weight)
            self.change.grad = learned.add_(self._value, alpha=2 * strength)
        else:
            self.change.grad = torch.addmm(self._value, self._image_t, along, beta=2 * strength)
        if clear:
            self.layer.store(G.addmm_(along, self._basis_t, alpha=-1), gradient, bias)

    def follow(self) -> None:
        """W_eff <- W_eff + W B (S_new - S_old) B^T."""
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
        projected: names of those whose gradients somebody projects after :meth:`take`, span(B)
            included.
    """

    def __init__(self, layers: Sequence[LinearMap], projected: Collection[str] = ()) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self.projected = frozenset(projected)
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
        self.spaces[name] = RelaxedSpace(layer, basis, image, change)

    def parameters(self) -> list[nn.Parameter]:
        """S - I of every space, where the layers' weights are."""
        spaces = [self.spaces[name] for name in self.layers if name in self.spaces]
        for space in spaces:
            space.stay_with_layer()
        return [space.change for space in spaces]

    def take(self, strength: float) -> None:
        """Gradients are ready: what lies in a relaxed space trains its S instead of the weight.

        Args:
            strength: of a penalty ||S - I||_F^2 on every S.
        """
        for name, space in self.spaces.items():
            space.take(strength, clear=name not in self.projected)

    def follow(self) -> None:
        """S has moved: the weights follow."""
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
        self.spaces = {
            name: RelaxedSpace(
                self.layers[name],
                parts["basis"],
                cut_rows(parts["image"], self.layers[name].weight),
                parts["change"],
            )
            for name, parts in state.items()
        }
