"""Which optimizers keep a projected gradient in its subspace: the one place that says it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import SGD, Optimizer

OptimizerFactory = Callable[[Iterable[dict[str, Any]]], Optimizer]


def place_of(
    optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]
) -> Literal["gradient", "step"]:
    """Where projecting keeps the *weight change* in the subspace.

    A projected gradient stays projected under plain SGD, also with momentum if that starts from
    nothing, and clipping by norm. Weight decay, momentum of an earlier task and adaptive rates lead
    out of the subspace again, whether the optimizer's own or a parameter group's. With several
    optimizers, each step would rewrite the gradients of the others once more.

    Args:
        optimizers: all that move the parameters, as they are before the first step.
        parameters: those whose changes are to stay; what else an optimizer holds does not count.

    Returns:
        ``gradient`` where projected gradients are enough, ``step`` where changes are to be.
    """
    found = list(optimizers)
    if len(found) != 1 or type(found[0]) is not SGD:
        return "step"
    own = {id(p) for p in parameters}
    carried = any(
        state.get("momentum_buffer") is not None and id(parameter) in own
        for parameter, state in found[0].state.items()
    )
    decayed = any(
        group["weight_decay"] != 0 and any(id(p) in own for p in group["params"])
        for group in found[0].param_groups
    )
    return "step" if carried or decayed else "gradient"


def place_of_factory(
    factory: OptimizerFactory,
    groups: Sequence[dict[str, Any]],
    parameters: Iterable[nn.Parameter],
) -> Literal["gradient", "step"]:
    """The same for optimizers that are built afresh for every task.

    Args:
        factory: builds one.
        groups: that it would be given; if empty, it is tried on a vector of one number.
        parameters: those whose changes are to stay.

    Returns:
        As :func:`place_of`; ``step`` where the factory refuses what it is tried on, as one for
        matrices alone refuses vectors.
    """
    try:
        made = factory(groups or [{"params": [nn.Parameter(torch.zeros(1))]}])
    except (TypeError, ValueError):
        return "step"
    return place_of([made], parameters)
