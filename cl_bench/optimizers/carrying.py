"""What an optimizer knows at the end of a task, for the one of the next task."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

AtTask = Literal["reset", "keep", "keep_second_moments"]
"""What becomes of an optimizer's state when a task begins."""

FIRST = ("momentum_buffer", "exp_avg", "grad_avg")
"""What optimizers call running means of gradients."""

OF_WEIGHTS = ("slow",)
"""What is no statistic but weights of before, which the end of a task may have changed."""

Carried = dict[str, dict[str, Any]]
"""The state of parameters, by their names."""


def taken(optimizer: Optimizer, named: Mapping[str, nn.Parameter]) -> Carried:
    """The state of every parameter that has one; copies."""
    return {
        name: {k: _copy(v) for k, v in optimizer.state[p].items() if k not in OF_WEIGHTS}
        for name, p in named.items()
        if p in optimizer.state
    }


def give(
    optimizer: Optimizer, named: Mapping[str, nn.Parameter], carried: Carried, at_task: AtTask
) -> None:
    """Let a fresh optimizer of the same kind go on from what was :func:`taken`.

    Parameters that had no state begin afresh. With ``keep_second_moments``, running means of
    gradients are zero again; counts of steps go on, since bias corrections of what stays need them.
    """
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    for name, state in carried.items():
        parameter = named.get(name)
        if parameter is None or parameter not in trained:
            continue
        mine = optimizer.state[parameter]
        mine.update({k: _copy(v, parameter) for k, v in state.items()})
        if at_task == "keep_second_moments":
            for key in FIRST:
                if isinstance(mine.get(key), Tensor):
                    mine[key].zero_()


def _copy(value: Any, of: nn.Parameter | None = None) -> Any:
    if isinstance(value, Tensor):
        copy = value.detach().clone()
        return copy.to(of.device) if of is not None and value.dim() else copy
    if isinstance(value, Mapping):
        return {k: _copy(v, of) for k, v in value.items()}
    return value
