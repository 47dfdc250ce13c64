"""A network as it was: what distillation learns from."""

import copy
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_bench.contracts import Batch
from cl_bench.contracts.learner import Heads
from cl_bench.learners.rounding import Rounding
from cl_bench.subspace import ConfinedLinear

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Snapshot:
    """A frozen copy of a learner's network: evaluation mode, no gradients, its heads as they were.

    It computes on the learner's device and in its precision, whatever those have become. No module
    holds it, so it is in no ``state_dict`` and no ``parameters()``. What modules compute is copied;
    hooks on them are left behind, but for those that make a weight of other parameters or round it.

    Args:
        learner: may go on to learn.
        left: what of it stays behind, as ``deepcopy`` takes it: what stands in for it by its id.
    """

    def __init__(self, learner: Any, left: Mapping[int, Any]) -> None:
        self._learner = weakref.ref(learner)
        memo = dict(left)
        for module in learner.network.modules():
            memo.update({id(vars(module)[name]): _kept(vars(module)[name]) for name in HOOKS})
            if isinstance(module, ConfinedLinear):  # it matters to gradients alone
                memo[id(module.projection)] = module.projection
        self._copy: Any = copy.deepcopy(learner, memo)
        for module in self._copy.network.modules():
            if isinstance(module, ConfinedLinear):
                ConfinedLinear.detach(module)
        self._copy.network.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, batch: Batch, head: int | None = None) -> Tensor:
        """What the learner would have said."""
        self._follow(batch)
        out: Tensor = self._copy(self._copy._to_device(batch), head)
        return out

    @torch.no_grad()
    def features(self, batch: Batch, bare: bool = False) -> Tensor:
        """What its readout would have read."""
        self._follow(batch)
        features: Tensor = self._copy.features(batch, bare)
        return features

    @torch.no_grad()
    def readout(self, features: Tensor, heads: Heads = "seen") -> Tensor:
        """What its heads would have made of such features."""
        logits: Tensor = self._copy.readout(features, heads)
        return logits

    def _follow(self, batch: Batch) -> None:
        """To where the learner is now: a Trainer moves it once it is set up."""
        learner = self._learner()
        if learner is None:
            return
        learner._passed(batch, backward=False)
        now, then = _first(learner.network), _first(self._copy.network)
        if now.device != then.device:
            self._copy.network.to(now.device)
        if now.dtype != then.dtype:
            self._copy.network.to(now.dtype)


def _first(network: nn.Module) -> Tensor:
    return next(network.parameters())


def _kept(hooks: Mapping[int, Any]) -> "OrderedDict[int, Any]":
    own = "torch.nn.utils"  # weight and spectral norm

    def stays(hook: Any) -> bool:
        rounds = isinstance(getattr(hook, "__self__", None), Rounding)
        return rounds or type(hook).__module__.startswith(own)

    return OrderedDict((k, h) for k, h in hooks.items() if stays(h))
