"""What an optimizer cannot do, refused before any work starts."""

from collections.abc import Mapping

from torch import nn
from torch.optim import Optimizer

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.learner import Role
from cl_bench.optimizers.by_role import ByRole
from cl_bench.optimizers.carrying import AtTask
from cl_bench.optimizers.moments import keeps_second_moments
from cl_bench.optimizers.traits import parts, traits_of


def check_optimizer(
    made: Optimizer,
    named: Mapping[str, nn.Parameter],
    roles: Mapping[str, Role],
    processes: int,
    shared_out: bool,
    precision: str,
) -> None:
    """Raise :class:`UsageError` if the rule does not go with the network or the Trainer.

    Args:
        made: one of its optimizers, of any parameters.
        named: the network's parameters.
        roles: by the same names.
        processes: that train together.
        shared_out: whether they share out the weights (FSDP2).
        precision: the Trainer's.
    """
    name, traits = rule_name(made), traits_of(made)
    if traits.matrices:
        for key, parameter in named.items():
            if roles[key] == "matrix" and parameter.dim() != 2:
                raise UsageError(
                    f"optimizer: {name} takes matrices, and {key!r} is of shape "
                    f"{tuple(parameter.shape)}: use optimizer=normuon, adamuon or newton_schulz, "
                    "which read a kernel as one"
                )
    if shared_out and traits.whole:
        raise UsageError(
            f"optimizer: {name} needs whole weights, and trainer=fsdp leaves rows of them in each "
            "process: use trainer=ddp, or an optimizer of single entries such as optimizer=adamw"
        )
    if processes > 1 and traits.draws:
        raise UsageError(
            f"optimizer: {name} draws random numbers, which differ between the {processes} "
            "processes that are to take one step: use trainer=default, or another optimizer"
        )
    fused = any(group.get("fused") for part in parts(made) for group in part.param_groups)
    if fused and precision.startswith("16"):
        raise UsageError(
            f"optimizer.fused=true: with trainer.precision={precision} it would unscale gradients "
            "after strategies have seen them: use fused=null, or trainer.precision=bf16-mixed"
        )


def check_at_task(made: Optimizer, at_task: AtTask, federated: bool, shared_out: bool) -> None:
    """Raise :class:`UsageError` if the state cannot be carried into the next task as asked."""
    if at_task == "reset":
        return
    said, name = f"optimizer.at_task={at_task}", rule_name(made)
    if federated:
        raise UsageError(
            f"{said}: clients of a federation begin every round with fresh optimizers; use reset"
        )
    if shared_out:
        raise UsageError(f"{said}: trainer=fsdp shares the state out; use reset, or trainer=ddp")
    if not traits_of(made).carried:
        raise UsageError(
            f"{said}: {name} keeps counters and bases that belong to no parameter; use reset"
        )
    if at_task == "keep_second_moments" and not any(map(keeps_second_moments, parts(made))):
        raise UsageError(f"{said}: {name} keeps no second moments; use reset or keep")


def rule_name(made: Optimizer) -> str:
    """The class that is meant: of a composite, what steps the matrices."""
    if isinstance(made, ByRole):
        return type(made.inner[0]).__name__
    return type(made).__name__
