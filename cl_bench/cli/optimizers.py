"""An optimizer's factory from its configuration, tried before any work."""

import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict
from torch import nn
from torch.optim import Optimizer

from cl_bench.cli.kinds import require_made
from cl_bench.cli.objects import as_values, checked_options, explained, refuse_given, target_of
from cl_bench.contracts import UsageError
from cl_bench.contracts.options import known, shown
from cl_bench.experiment import processes, shares_weights
from cl_bench.learners import BaseLearner
from cl_bench.optimizers import (
    AtTask,
    OptimizerFactory,
    check_at_task,
    check_optimizer,
    takes_roles,
    traits_of,
)

LIBRARY = "pytorch_optimizer"

UNNAMED = {"GaLore": ("rank", "update_proj_gap", "scale", "projection_type")}
"""Options of the library's classes that their signatures do not name."""


@dataclass(frozen=True)
class Built:
    """What makes a run's optimizers.

    Attributes:
        factory: from groups of parameters.
        at_task: what becomes of an optimizer's state when a task begins.
        tried: one on parameters of its own; None where the factory takes only others.
    """

    factory: OptimizerFactory
    at_task: AtTask = "reset"
    tried: Optimizer | None = None

    @classmethod
    def given(cls, factory: OptimizerFactory) -> "Built":
        """Of a factory that somebody made in Python."""
        try:
            return cls(factory, tried=factory(_groups(factory)))
        except (TypeError, ValueError):
            return cls(factory)


def build_optimizer(cfg: DictConfig) -> Built:
    """The factory, tried once on parameters of its own: a negative rate shows before any work.

    Raises:
        UsageError: a rule's package is missing, or an option is not what it must be.
    """
    options = cfg.copy()
    options._set_parent(cfg._get_parent())
    with open_dict(options):
        at_task = options.pop("at_task", "reset")
    if at_task not in get_args(AtTask):
        choices = ", ".join(get_args(AtTask))
        raise UsageError(f"optimizer.at_task={shown(at_task)}: must be one of {choices}")
    for node in _rules(options):
        _require_library(node)
        with explained(node):
            checked_options(target_of(node), node)
            _refuse_unnamed(node)
    with explained(options):
        refuse_given(options, ["params"])
        factory = instantiate(options, _partial_=True, _convert_="all")
        with as_values():
            tried = factory(_groups(factory))
            require_made(tried, options)
    return Built(factory, at_task, tried)


def _groups(factory: OptimizerFactory) -> list[dict[str, Any]]:
    if not takes_roles(factory):
        return [{"params": [nn.Parameter()]}]
    matrix, vector = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    return [{"params": [matrix], "role": "matrix"}, {"params": [vector], "role": "vector"}]


def _rules(cfg: DictConfig) -> Iterator[DictConfig]:
    """The node, and those inside it that make optimizers too."""
    yield cfg
    for key in cfg:
        inner = cfg._get_node(key)
        if isinstance(inner, DictConfig) and "_target_" in inner:
            yield from _rules(inner)


def _require_library(node: DictConfig) -> None:
    if str(node._target_).partition(".")[0] == LIBRARY and not importlib.util.find_spec(LIBRARY):
        raise UsageError(
            f"{node._get_full_key('_target_')}={node._target_}: the package is not installed: "
            "pip install 'cl_bench[optimizers]', or choose another optimizer"
        )


def _refuse_unnamed(node: DictConfig) -> None:
    """The library's classes take any keyword, and pass over those that they do not know."""
    target = target_of(node)
    if target.__module__.partition(".")[0] != LIBRARY:
        return
    names = [p.name for p in inspect.signature(target).parameters.values()]
    names += UNNAMED.get(target.__name__, ())
    for key in map(str, node):
        if not key.startswith("_") and key not in names:
            raise UsageError(
                f"{node._get_full_key(key)}={shown(node[key])}: {target.__name__} has no such "
                f"argument.{known(key, names)}"
            )


def check_rule(built: Built, learner: BaseLearner, trainer: DictConfig, federated: bool) -> None:
    """Hand the learner what it must know of its optimizers.

    Raises:
        UsageError: the rule does not go with the network, the Trainer or the federation.
    """
    if built.tried is None:
        return
    shared_out, precision = shares_weights(trainer), str(trainer.get("precision", "32-true"))
    check_optimizer(
        built.tried,
        dict(learner.network.named_parameters()),
        learner.roles(),
        processes(trainer),
        shared_out,
        precision,
    )
    check_at_task(built.tried, built.at_task, federated, shared_out)
    learner.at_task = built.at_task
    learner.resumes_inside = federated or traits_of(built.tried).inside


def remarks(learner: BaseLearner) -> list[str]:
    """What to say of the run's optimizers where it begins."""
    found = []
    if learner.rounding is not None:
        kind = str(learner.rounding.dtype).removeprefix("torch.")
        found.append(f"weights are float32 masters, rounded to {kind} for each pass")
    if learner.at_task != "reset":
        what = "its state" if learner.at_task == "keep" else "its second moments"
        found.append(f"the optimizer of a task goes on with {what} of the last one")
    if not learner.resumes_inside:
        found.append(
            "the optimizer's state cannot be restored inside a task: checkpoints are written "
            "between tasks alone, and a signal ends the run at once"
        )
    return found
