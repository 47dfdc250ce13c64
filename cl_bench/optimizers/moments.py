"""What optimizers estimate of squared gradients."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Adadelta, Adagrad, Adam, NAdam, Optimizer, RAdam, RMSprop, SparseAdam

from cl_bench.contracts.errors import UsageError
from cl_bench.optimizers.traits import parts

KEYS = ("exp_avg_sq", "square_avg", "sum")
"""What optimizers call it: Adam's family, RMSprop and Adadelta, Adagrad."""

KNOWN = (Adam, NAdam, RAdam, SparseAdam, RMSprop, Adadelta, Adagrad)
"""Those of torch that keep one, from the first step on."""


def keeps_second_moments(optimizer: Optimizer) -> bool:
    """Whether it keeps one for each entry of a weight."""
    return isinstance(optimizer, KNOWN)


def second_moments(
    optimizers: Sequence[Optimizer], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The running estimate of every parameter that has one, by name: the optimizer's own tensor.

    Args:
        optimizers: that train.
        parameters: by name.

    Raises:
        UsageError: there is no optimizer, or none keeps such an estimate.
    """
    if not optimizers:
        raise UsageError(
            "second moments are an optimizer's, and none trains now: ask between the first step of "
            "a task and the end of consolidate"
        )
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        states = [o.state[parameter] for o in optimizers if parameter in o.state]
        for moment in (state[key] for state in states for key in KEYS if key in state):
            if moment.shape == parameter.shape:  # not a row's or a column's alone
                found[name] = moment
    if not found and not any(keeps_second_moments(p) for o in optimizers for p in parts(o)):
        names = " and ".join(type(optimizer).__name__ for optimizer in optimizers)
        raise UsageError(
            f"{names} keeps no second moment for each weight: use optimizer=adam, or another of "
            "Adam's family, RMSprop, Adadelta or Adagrad"
        )
    return found
