"""Letting a layer be rescaled inside subspaces of its inputs: W_eff = W + sum W B (S - I) B^T.

B (d x q) is orthonormal, S (q x q) is trained and starts at I. While W does not move inside
span(B), W B is a constant, and no d x d matrix is ever needed:

* a large linear layer adds ((x B) (S - I)^T) (W B)^T to its output;
* a small one, and a convolution, whose input vectors are many, adds (W B) (S - I) B^T to its
  weight.

Since W B is a constant, the loss reaches W through the layer's own pass alone: projecting inputs
instead of gradients stays right, and gradients of W are those of W_eff.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cl_bench.subspace.linear_maps import LinearMap

WORTHWHILE = 1e6
"""Multiplications that rescaling outputs must save a step: it takes twice as many operations."""


class Scaling:
    """One term W B (S - I) B^T of a layer's effective weight.

    Args:
        layer: whose matrix W (o, d) is meant.
        basis: B (d, q), orthonormal.
        image: W B (o, q), a constant; None computes it from the weight in every pass, for a W that
            moves inside span(B).
        change: S - I (q, q); None starts at zero.

    Attributes:
        change: S - I (q, q), a parameter; zero is exactly no effect.
    """

    def __init__(
        self,
        layer: LinearMap,
        basis: Tensor,
        image: Tensor | None = None,
        change: Tensor | None = None,
    ) -> None:
        weight = layer.weight.detach()
        q = basis.shape[1]
        self.layer = layer
        self.basis = basis.detach().to(weight).contiguous()
        self.image = None if image is None else image.detach().to(weight).contiguous()
        start = weight.new_zeros(q, q) if change is None else change.detach().to(weight)
        self.change = nn.Parameter(start.clone())
        self._inwards()

    def _inwards(self) -> None:
        inputs = self.layer.in_features - self.layer.augmented
        self._into = self.basis[:inputs].t().contiguous()
        self._offset = self.basis[-1] if self.layer.augmented else None

    def follow(self) -> None:
        """Go where the layer's weight is."""
        weight = self.layer.weight
        if self.basis.device != weight.device or self.basis.dtype != weight.dtype:
            self.basis = self.basis.to(weight)
            self.image = None if self.image is None else self.image.to(weight)
            self.change.data = self.change.data.to(weight)
            self._inwards()

    def through(self) -> Tensor:
        """W B (o, q)."""
        if self.image is not None:
            return self.image
        return self.layer.matrix(self.layer.weight, self.layer.bias) @ self.basis

    def saves(self, x: Tensor) -> bool:
        """Whether the term costs clearly less on the output for ``x`` than on the weight."""
        d, q = self.basis.shape
        o, n = self.layer.out_features, x.numel() // x.shape[-1]
        return q * (o * d - n * (o + d)) > WORTHWHILE

    def output(self, out: Tensor, x: Tensor) -> Tensor:
        """``out`` (..., o) plus what the term does to the inputs ``x`` (..., d)."""
        inside = F.linear(F.linear(x, self._into, self._offset), self.change)
        if out.dim() == 2:
            return torch.addmm(out, inside, self.through().t())
        return out + F.linear(inside, self.through())

    def added_to(self, matrix: Tensor) -> Tensor:
        """``matrix`` (o, d) plus W B (S - I) B^T."""
        return torch.addmm(matrix, self.through() @ self.change, self.basis.t())


class Rescaling:
    """Gives layers an effective weight while it is attached.

    Attach it after whatever else changes a layer's class, and release it before: it wraps the
    forward pass that it finds.

    Args:
        layers: the layers that may be rescaled.
    """

    def __init__(self, layers: Sequence[LinearMap]) -> None:
        self.layers = {layer.name: layer for layer in layers}
        self.terms: dict[str, list[Scaling]] = {}
        self._swapped: list[nn.Module] = []

    def add(
        self,
        name: str,
        basis: Tensor,
        image: Tensor | None = None,
        change: Tensor | None = None,
        live: bool = False,
    ) -> None:
        """Add a term to layer ``name`` (see :class:`Scaling`).

        Without ``image`` and unless ``live``, W B is taken from the weight as it is now.
        """
        layer = self.layers[name]
        if image is None and not live:
            image = _image(layer, basis)
        self.terms.setdefault(name, []).append(Scaling(layer, basis, image, change))

    def attach(self) -> None:
        """Swap the classes of the layers that have terms; again after terms were added."""
        self.release()
        by_module: dict[nn.Module, list[list[Scaling]]] = {}
        for name, layer in self.layers.items():
            by_module.setdefault(layer.module, []).append(self.terms.get(name, []))
        for module, scalings in by_module.items():
            if any(scalings):
                module.__class__ = _rescaled(type(module))
                module.__dict__["scalings"] = scalings
                self._swapped.append(module)

    def release(self) -> None:
        """Give the layers the class back that they had."""
        for module in self._swapped:
            module.__class__ = type(module).__bases__[1]
            del module.__dict__["scalings"]
        self._swapped = []

    def clear(self) -> None:
        """Release, and forget all terms."""
        self.release()
        self.terms = {}

    def parameters(self) -> list[nn.Parameter]:
        """S - I of every term, where the layers' weights are."""
        terms = [term for name in self.layers for term in self.terms.get(name, ())]
        for term in terms:
            term.follow()
        return [term.change for term in terms]

    def state_dict(self) -> dict[str, list[dict[str, Any]]]:
        """B, W B and S - I of every term, by layer."""
        return {
            name: [
                {"basis": t.basis, "image": t.image, "change": t.change.detach().clone()}
                for t in terms
            ]
            for name, terms in self.terms.items()
        }

    def load_state_dict(self, state: dict[str, list[dict[str, Any]]]) -> None:
        """Inverse of :meth:`state_dict`; attaches."""
        self.clear()
        for name, terms in state.items():
            for term in terms:
                self.add(name, **term, live=term["image"] is None)
        self.attach()


class _RescaledLinear(nn.Module):
    """Before a linear layer in the order of its bases: adds the terms to its output or weight."""

    scalings: list[list[Scaling]]

    def forward(self, x: Tensor) -> Tensor:
        (terms,) = self.scalings
        for term in terms:
            term.follow()
        if type(self).__bases__[1] is nn.Linear and not any(term.saves(x) for term in terms):
            return self._with_effective_weight(x, terms)
        out: Tensor = super().forward(x)
        for term in terms:
            out = term.output(out, x)
        return out

    def _with_effective_weight(self, x: Tensor, terms: list[Scaling]) -> Tensor:
        layer = terms[0].layer
        matrix = layer.matrix(layer.weight, layer.bias)
        for term in terms:
            matrix = term.added_to(matrix)
        if layer.augmented:
            return F.linear(x, matrix[:, :-1], matrix[:, -1])
        return F.linear(x, matrix, layer.bias)


class _RescaledConv(nn.Module):
    """Before a convolution in the order of its bases: adds the terms to its weight."""

    scalings: list[list[Scaling]]

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weights = list(weight.chunk(len(self.scalings)))
        biases = [] if bias is None else list(bias.chunk(len(self.scalings)))
        for g, terms in enumerate(self.scalings):
            if not terms:
                continue
            layer, shape = terms[0].layer, weights[g].shape
            matrix = layer.matrix(weight, bias)
            for term in terms:
                term.follow()
                matrix = term.added_to(matrix)
            if layer.augmented:
                matrix, biases[g] = matrix[:, :-1], matrix[:, -1]
            weights[g] = matrix.reshape(shape)
        bias = torch.cat(biases) if biases else None
        out: Tensor = super()._conv_forward(x, torch.cat(weights), bias)  # type: ignore[misc]
        return out


def _image(layer: LinearMap, basis: Tensor) -> Tensor:
    """W B (o, q) as the weight is now."""
    bias = None if layer.bias is None else layer.bias.detach()
    matrix = layer.matrix(layer.weight.detach(), bias)
    return matrix @ basis.to(matrix)


def _rescaled(cls: type[nn.Module]) -> type[nn.Module]:
    """``cls`` with an effective weight; under its name, by which some layers are known."""
    mixin = _RescaledConv if issubclass(cls, nn.Conv1d | nn.Conv2d) else _RescaledLinear
    return type(cls.__name__, (mixin, cls), {})
