"""Update rules, and what they do to gradients that lie in a subspace.

Torch's own and those of ``pytorch_optimizer`` are used as they are; files here are of rules that
neither has. Importing this loads none of the optional packages.
"""

from cl_bench.optimizers.by_role import ByRole, split_by_role, takes_roles
from cl_bench.optimizers.carrying import AtTask, Carried, give, taken
from cl_bench.optimizers.checks import check_at_task, check_optimizer, rule_name
from cl_bench.optimizers.keeps import OptimizerFactory, place_of, place_of_factory
from cl_bench.optimizers.moments import second_moments
from cl_bench.optimizers.traits import traits_of

__all__ = [
    "AtTask",
    "ByRole",
    "Carried",
    "OptimizerFactory",
    "check_at_task",
    "check_optimizer",
    "give",
    "place_of",
    "place_of_factory",
    "rule_name",
    "second_moments",
    "split_by_role",
    "taken",
    "takes_roles",
    "traits_of",
]
