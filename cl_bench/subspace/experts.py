"""Mixtures of experts as transformers keeps them: a router, and experts stacked in one weight.

An expert is two matrices, one into its hidden units (gate and input side by side, or an input
alone) and one out of them. Each sees the tokens that the router sends to its expert, so that is
what second moments are taken of.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

INTO = ("gate_up_proj", "up_proj")
"""Names of the weight into the hidden units: with a gate, and without."""

OUT_OF = "down_proj"


def is_experts(module: nn.Module) -> bool:
    """Whether the module holds experts whose layout transformers tells.

    Not those of classes that it has no common form for: their weights are parameters like others.
    """
    told = all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias"))
    return told and len(expert_weights(module)) == 2


def expert_weights(module: nn.Module) -> list[str]:
    """Names of the parameters (experts, ., .) of :func:`is_experts`, in forward order."""
    names = [*INTO, OUT_OF]
    own = dict(module.named_parameters(recurse=False))
    return [name for name in names if name in own and own[name].dim() == 3]


def bias_of(parameter: str) -> str:
    """What the bias beside a weight of that name is called."""
    return "bias" if parameter == "weight" else f"{parameter}_bias"


def is_router(module: nn.Module) -> bool:
    """Whether the module scores experts by a linear map of its own: W (experts, d)."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    named = type(module).__name__.lower().endswith("router")
    return named and weight is not None and weight.dim() == 2


def call_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Tokens (T, d) and the experts (T, k) that each goes to, of a call of experts."""
    given = [*args, *kwargs.values()]
    hidden = next(x for x in given if isinstance(x, Tensor) and x.is_floating_point())
    index = next(x for x in given if isinstance(x, Tensor) and not x.is_floating_point())
    return hidden, index


@torch.no_grad()
def hidden_units(experts: Any, tokens: Tensor, expert: int) -> Tensor:
    """What enters an expert's second matrix for tokens (n, d) that go to it; (n, hidden)."""
    name = INTO[0] if experts.has_gate else INTO[1]
    W = getattr(experts, name)[expert]
    bias = getattr(experts, bias_of(name))[expert] if experts.has_bias else None
    made = F.linear(tokens, W.t() if experts.is_transposed else W, bias)
    found: Tensor = experts._apply_gate(made) if experts.has_gate else experts.act_fn(made)
    return found
