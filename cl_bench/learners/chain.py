"""Passes of a chain of linear layers and ReLUs, worked out by hand.

Autograd and a module's call take as long as the products themselves where a batch is a handful of
samples and a layer a hundred units wide. The loss, and whatever joins it, stays autograd's: it
begins at the network's output, a leaf, and :meth:`Chain.backward` goes on from the gradient there.
The products are those that autograd makes, in its order. Whoever hooks into the pass, or wants to
differentiate through it, would miss it: a chain is for where there are no hooks, no ``forward`` put
in a module's place, no autocast, and no strategy that has a say in the loss.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules import module as machinery

from cl_bench.contracts import Batch
from cl_bench.subspace import ConfinedLinear

_threshold_backward = torch.ops.aten.threshold_backward.default

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)


class Chain:
    """Linear layers with a ReLU between each two.

    Args:
        layers: in order, none of them lifted by :func:`~cl_bench.subspace.unconfined`. Their
            gradients may be born projected.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = [(layer, layer._parameters) for layer in layers]
        self._passed: list[tuple[Tensor, Tensor | None, Tensor, Tensor]] = []
        self._out = torch.empty(0)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A learner that is copied between two steps has layers of its own."""
        return

    @staticmethod
    def can_replace(
        around: Sequence[nn.Module], layers: Sequence[nn.Module], device: torch.device
    ) -> bool:
        """Whether calling modules that apply ``layers``, with ReLUs between, does no more, now.

        Args:
            around: the modules whose ``forward`` does so.
            layers: what they apply.
            device: where they are.
        """
        return (
            all(_is_linear(layer) for layer in layers)
            and not any(_is_watched(module) for module in (*around, *layers))
            and not machinery._has_any_global_hook()  # type: ignore[no-untyped-call]
            and not torch.is_autocast_enabled(device.type)
            and not torch.is_anomaly_enabled()
        )

    def __call__(self, batch: Batch) -> Tensor:
        """The last layer's output (n, o) for ``batch["x"]``, a leaf."""
        x, passed = batch["x"].flatten(1), self._passed
        passed.clear()
        entered = x
        with torch.no_grad():
            for layer, parameters in self.layers:
                if passed:
                    entered = torch.relu_(x)
                weight, bias = parameters["weight"], parameters["bias"]
                assert weight is not None
                if type(layer) is ConfinedLinear:
                    x, learned_from = layer.by_hand(entered)
                else:
                    x, learned_from = F.linear(entered, weight, bias), entered
                passed.append((weight, bias, entered, learned_from))
        self._out = x.requires_grad_()
        return self._out

    def backward(self) -> None:
        """Add dL/dW = delta^T x, or delta^T (x P), and dL/db = sum delta to what autograd has left.

        Called after autograd, it adds in autograd's order.
        """
        delta = self._out.grad
        first = len(self._passed) - 1
        with torch.no_grad():
            for i, (weight, bias, entered, learned_from) in enumerate(reversed(self._passed)):
                if delta is None:
                    break
                if weight.requires_grad:
                    _add(weight, torch.mm(delta.t(), learned_from))
                if bias is not None and bias.requires_grad:
                    _add(bias, delta.sum(0))
                if i < first:
                    delta = _threshold_backward(torch.mm(delta, weight), entered, 0)
        self._passed.clear()


def _add(parameter: Any, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)


def _is_linear(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return (
        type(layer) in (nn.Linear, ConfinedLinear)
        and layer._parameters.keys() == {"weight", "bias"}
        and weight is not None
        and weight.is_contiguous()
        and not getattr(layer, "augmented", False)
    )


def _is_watched(module: nn.Module) -> bool:
    """Whether more than ``forward`` of its class happens when the module is called."""
    return (
        any(getattr(module, hooks) for hooks in _HOOKS)
        or "forward" in vars(module)
        or module._compiled_call_impl is not None
        or any(
            parameter._backward_hooks or parameter._post_accumulate_grad_hooks
            for parameter in module.parameters(recurse=False)
        )
    )
