"""One rule for the parameters of some roles, above all weight matrices, another for the rest."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from cl_bench.contracts.learner import Role
from cl_bench.optimizers.wrapped import Wrapped

Factory = Callable[..., Optimizer]


class ByRole(Wrapped):
    """A rule, and what steps the parameters that it is not for.

    Args:
        params: groups, each with its ``role``.
        rule: builds what steps the parameters of ``roles``.
        others: builds what steps all others.
        lr: of the rule. A group that brings a rate of its own changes both in the same proportion.
        roles: of the parameters that the rule is for.
        group: further entries of the rule's groups, where it asks for some.

    Raises:
        ValueError: a group does not say its role.
    """

    by_role: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        rule: Factory,
        others: Factory,
        lr: float,
        roles: Sequence[Role] = ("matrix",),
        group: Mapping[str, Any] | None = None,
    ) -> None:
        ours: list[dict[str, Any]] = []
        theirs: list[dict[str, Any]] = []
        for given in params:
            if "role" not in given:
                raise ValueError("every group must say the role of its parameters")
            if given["role"] in roles:
                ours.append({"lr": lr, **given, **(group or {})})
            else:
                theirs.append(dict(given))
        inner = []
        if ours:
            inner.append(rule(ours))
        if theirs:
            rates = [given.pop("lr", lr) / lr if lr else 1.0 for given in theirs]
            inner.append(others(theirs))
            for made, rate in zip(inner[-1].param_groups, rates, strict=True):
                made["lr"] = made["lr"] * rate
        super().__init__(inner)


def takes_roles(factory: Callable[..., Any]) -> bool:
    """Whether what a factory makes asks for the roles of parameters."""
    return bool(getattr(getattr(factory, "func", factory), "by_role", False))


def split_by_role(
    groups: Iterable[dict[str, Any]], named: Mapping[str, nn.Parameter], roles: Mapping[str, Role]
) -> list[dict[str, Any]]:
    """The groups, each cut into groups of one role, in the order in which roles occur.

    A parameter that the network does not name is of a strategy's own: a matrix if it has two
    dimensions or more, else a vector.

    Args:
        groups: of parameters.
        named: the network's parameters.
        roles: by the same names.
    """
    of: dict[Tensor, Role] = {parameter: roles[name] for name, parameter in named.items()}
    found: list[dict[str, Any]] = []
    for group in groups:
        parts: dict[Role, list[Any]] = {}
        for parameter in group["params"]:
            unnamed: Role = "matrix" if parameter.dim() > 1 else "vector"
            parts.setdefault(of.get(parameter, unnamed), []).append(parameter)
        found += [{**group, "params": params, "role": role} for role, params in parts.items()]
    return found
