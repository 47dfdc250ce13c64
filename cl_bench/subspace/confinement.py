"""Keeping the weight changes of some layers out of a subspace of their inputs.

Three places to do it, one update under plain SGD:

* ``gradient``: G <- G P after the backward pass.
* ``input``: since G = delta^T x gives G P = delta^T (x P), keep x P for the weight gradient. The
  raw gradient never exists. Cheaper where a step sees clearly fewer inputs than the layer has
  outputs; right only where the loss reaches the weight through this layer's forward pass alone.
* ``step``: W <- W_old + (W_new - W_old) P after the optimizer. Momentum carried over, Adam's
  preconditioner and weight decay lead a projected gradient out of the subspace again; this does
  not let them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cl_bench.subspace.ahead import InputsAhead
from cl_bench.subspace.linear_maps import LinearMap, first_uses
from cl_bench.subspace.projection import Projection
from cl_bench.subspace.rows import own_rows

Where = Literal["input", "gradient", "step"]

WORTHWHILE = 4e6
"""Multiplications that projecting inputs must save a step, to pay for leaving torch's own layer."""

_lifted: ContextVar[bool] = ContextVar("lifted", default=False)


@contextmanager
def unconfined() -> Iterator[None]:
    """Within this context layers yield their raw gradients, whatever confines them."""
    token = _lifted.set(True)
    try:
        yield
    finally:
        _lifted.reset(token)


class Confinement:
    """Projects the weight changes of ``layers`` while it is attached.

    Args:
        layers: the layers to confine; a weight that several share is confined once.
        projections: one per layer name; layers without one, or with a trivial one, stay free.
        where: ``input`` falls back, layer by layer, to ``gradient`` where that is cheaper.
        rows: input vectors per optimizer step by layer name (batch x patches), for that choice.
        gradients_too: with ``step``, project gradients as well, so that a rule that is not linear
            makes its step of what it is allowed.
    """

    def __init__(
        self,
        layers: Sequence[LinearMap],
        projections: Mapping[str, Projection],
        where: Where,
        rows: Mapping[str, float],
        gradients_too: bool = False,
    ) -> None:
        self.where = where
        self.gradients_too = gradients_too
        named = [layer for layer in layers if layer.name in projections]
        own = zip(named, first_uses(named), strict=True)
        self._layers = [layer for layer, first in own if layer is first]
        self._rows = rows
        self._projected: list[tuple[LinearMap, Projection]] = []
        self._joined: list[LinearMap] = []
        self._swapped: dict[str, ConfinedLinear] = {}
        self._before: list[Tensor] = []
        for layer in self._layers:
            self._confine(layer, projections[layer.name])

    def _confine(self, layer: LinearMap, projection: Projection) -> None:
        if projection.trivial:
            return
        if projection.dim != layer.in_features:
            raise ValueError(
                f"layer {layer.name!r} remembers inputs of {projection.dim} dimensions and has "
                f"{layer.in_features} now: keep it, and whether its bias is trainable, as it "
                "was in earlier tasks"
            )
        if layer.augmented:
            self._joined.append(layer)
        linear = layer.module
        if self.where == "input" and type(linear) is nn.Linear:
            saved = projection.cost * (layer.out_features - self._rows[layer.name])
            if saved > WORTHWHILE:
                confined = ConfinedLinear.attach(linear, projection, layer.augmented)
                self._swapped[layer.name] = confined
                return
        self._projected.append((layer, projection))

    @property
    def at_inputs(self) -> frozenset[str]:
        """Names of the layers whose gradients are born projected."""
        return frozenset(self._swapped)

    def replace(self, projections: Mapping[str, Projection]) -> None:
        """Other projections for some of the layers; what the rest has prepared stays."""
        for layer in self._layers:
            if layer.name not in projections:
                continue
            if layer.name in self._swapped:
                ConfinedLinear.detach(self._swapped.pop(layer.name))
            self._joined = [other for other in self._joined if other is not layer]
            self._projected = [pair for pair in self._projected if pair[0] is not layer]
            self._confine(layer, projections[layer.name])

    def constrain(self) -> None:
        """Gradients are ready: project them, or remember the weights for :meth:`after_step`.

        Raises:
            ValueError: a bias is frozen that is protected together with its weight, which moves.
        """
        for layer in self._joined:
            if layer.weight.requires_grad and not layer.bias.requires_grad:  # type: ignore[union-attr]
                raise ValueError(
                    f"the bias of layer {layer.name!r} was frozen after the layer was protected, "
                    "and its weight was not: freeze it before the learner is made, or use "
                    "protect.bias=frozen"
                )
        if self.where == "step":
            self._before = [
                layer.matrix(own_rows(layer.weight.detach()), _detached(layer.bias)).clone()
                for layer, _ in self._projected
            ]
            if not self.gradients_too:
                return
        for layer, projection in self._projected:
            gradient = layer.weight.grad
            if gradient is None:
                continue
            gradient = own_rows(gradient)
            if layer.is_one_tensor and gradient.is_contiguous():
                matrix = gradient.flatten(1)
                projection.to(matrix).inplace(matrix)
                continue
            bias = layer.bias
            bias_gradient = None if bias is None or bias.grad is None else own_rows(bias.grad)
            matrix = layer.matrix(gradient, bias_gradient)
            layer.store(projection.to(matrix).inplace(matrix), gradient, bias_gradient)

    def after_step(self) -> None:
        """The weights have moved: with ``where == "step"``, project the change."""
        if self.where != "step":
            return
        for (layer, projection), before in zip(self._projected, self._before, strict=True):
            weight, bias = own_rows(layer.weight.detach()), _detached(layer.bias)
            change = layer.matrix(weight, bias) - before
            layer.store(before + projection.to(change)(change), weight, bias)

    def state_dict(self) -> dict[str, Tensor]:
        """What a run that is resumed within the task needs, by layer name."""
        return {
            name: linear.ahead.anchor
            for name, linear in self._swapped.items()
            if linear.ahead.anchor is not None
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`state_dict`."""
        for name, linear in self._swapped.items():
            linear.ahead.anchor = state.get(name)

    def release(self) -> None:
        """Give the layers their own forward pass back."""
        for linear in self._swapped.values():
            ConfinedLinear.detach(linear)
        self._swapped, self._projected, self._joined, self._before = {}, [], [], []


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else own_rows(bias.detach())


class ConfinedLinear(nn.Linear):
    """A linear layer whose weight gradient is born projected.

    An existing layer becomes one by a change of class, which, unlike a replaced ``forward``,
    survives ``deepcopy`` with its own weights.
    """

    projection: Projection
    augmented: bool
    ahead: InputsAhead

    @staticmethod
    def attach(linear: nn.Linear, projection: Projection, augmented: bool) -> "ConfinedLinear":
        """Confine ``linear`` in place."""
        linear.__class__ = ConfinedLinear
        ahead = InputsAhead(projection)
        linear.__dict__.update(projection=projection, augmented=augmented, ahead=ahead)
        return cast(ConfinedLinear, linear)

    @staticmethod
    def detach(linear: nn.Linear) -> None:
        """Undo :meth:`attach`."""
        linear.__class__ = nn.Linear
        for name in ("projection", "augmented", "ahead"):
            del linear.__dict__[name]

    def forward(self, x: Tensor) -> Tensor:
        """``nn.Linear``'s output; only the gradient of the weight differs."""
        if not torch.is_grad_enabled() or _lifted.get():
            return F.linear(x, self.weight, self.bias)
        weight = self.weight
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):  # subspaces need full precision
                return self.forward(x.to(weight.dtype))
        known = self.ahead.of(x, weight) if bias is None and self.projection.exact else None
        if known is not None:
            projected, constant = known
            return torch.addmm(constant, projected, weight.t())
        out: Tensor = _LinearWithProjectedInput.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, self.projection, self.augmented
        )
        return out


class _LinearWithProjectedInput(torch.autograd.Function):
    """y = x W^T + b with dL/dW = delta^T (x P)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        projection: Projection,
        augmented: bool,
    ) -> Tensor:
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if augmented:
            rows = F.pad(rows, (0, 1), value=1.0)
        ctx.save_for_backward(projection.to(rows)(rows), weight)
        ctx.augmented = augmented
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        projected, weight = ctx.saved_tensors
        delta = grad if grad.dim() == 2 else grad.reshape(-1, grad.shape[-1])
        to_input = grad @ weight if ctx.needs_input_grad[0] else None
        to_weight = delta.t() @ projected
        if ctx.augmented:
            return to_input, to_weight[:, :-1], to_weight[:, -1], None, None
        to_bias = delta.sum(0) if ctx.needs_input_grad[2] else None
        return to_input, to_weight, to_bias, None, None
