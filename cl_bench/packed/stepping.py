"""Backward passes and optimizer steps without what torch puts around them, for very short steps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim import optimizer as machinery

_ENGINE: Any = torch.autograd.Variable._execution_engine


def short_backward(loss: Tensor, gradient: Tensor) -> None:
    """``loss.backward(gradient)`` without the checks that come before torch's engine.

    They take as long as a layer of a small network, and a learner's own loss passes all of them.
    """
    if type(loss) is not Tensor:
        loss.backward(gradient)  # type: ignore[no-untyped-call]
        return
    _ENGINE.run_backward(
        (loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def short_step(optimizer: Optimizer) -> Callable[[], object]:
    """``optimizer.step`` as it is best called many times in a row.

    Torch labels every step for profilers and passes its arguments through hooks, which for a small
    network takes longer than the update itself. Where nobody profiles, counts steps (a schedule
    does, by wrapping the method) or wants the arguments, only what lies inside is called, and then
    the hooks that wait for its end.
    """
    method: Any = type(optimizer).step
    hooks = optimizer._optimizer_step_post_hooks
    watched = (
        "step" in vars(optimizer)
        or not getattr(method, "hooked", False)
        or not hasattr(method, "__wrapped__")
        or optimizer._optimizer_step_pre_hooks
        or machinery._global_optimizer_pre_hooks
        or machinery._global_optimizer_post_hooks
        or torch.autograd.profiler._is_profiler_enabled
    )
    if watched:
        return optimizer.step
    inside: Callable[[Optimizer], object] = method.__wrapped__
    if _is_plain(optimizer):
        inside = _plain_step(optimizer)

    def step() -> None:
        inside(optimizer)
        for hook in hooks.values():
            hook(optimizer, (), {})

    return step


def _is_plain(optimizer: Optimizer) -> bool:
    """Whether a step is theta <- theta - lr g and keeps nothing."""
    options = ("momentum", "weight_decay", "maximize", "differentiable", "fused")
    return type(optimizer) is SGD and all(
        group["foreach"] is False  # None may mean all at once, on a GPU
        and not isinstance(group["lr"], Tensor)
        and not any(group[option] for option in options)
        for group in optimizer.param_groups
    )


def _plain_step(optimizer: Optimizer) -> Callable[[Optimizer], None]:
    """What torch's SGD comes down to, to the bit, where :func:`_is_plain`."""
    # Detached, they can be written to without switching autograd off and on in every step.
    groups = [
        (group, [(p, p.detach()) for p in group["params"]]) for group in optimizer.param_groups
    ]

    def step(_: Optimizer) -> None:
        for group, weights in groups:
            rate = -group["lr"]
            for parameter, weight in weights:
                if (gradient := parameter.grad) is not None:
                    weight.add_(gradient, alpha=rate)

    return step
