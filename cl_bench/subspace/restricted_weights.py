"""The weights of some layers while each of them keeps its leading singular triplets."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_bench.subspace.linear_maps import LinearMap
from cl_bench.subspace.restricted import (
    Kind,
    Parametrisation,
    RestrictedUpdate,
    Restriction,
    restricted_update,
)
from cl_bench.subspace.spectrum import Split


class RestrictedWeights:
    """What every layer keeps, and what it learns through.

    Args:
        kind: which changes are admissible.
        parametrisation: what is trained.

    Attributes:
        splits: by layer, what it keeps.
        updates: by layer, what it learns through; none where nothing is left to learn.
    """

    def __init__(self, kind: Kind, parametrisation: Parametrisation) -> None:
        self.kind: Kind = kind
        self.parametrisation: Parametrisation = parametrisation
        self.splits: dict[str, Split] = {}
        self.updates: dict[str, RestrictedUpdate] = {}
        self._fixed: list[LinearMap] = []

    def keep(self, layer: LinearMap, split: Split, start: Tensor) -> Restriction:
        """From now on ``layer`` keeps the leading triplets of ``start``, W_0 (n, m).

        Raises:
            ValueError: the layer's weight cannot learn so.
        """
        restriction = Restriction(split, self.kind)
        if restriction.free:
            update = restricted_update(layer, restriction, start, self.parametrisation)
            self.updates[layer.name] = update
        else:  # k = r
            self._fixed.append(layer)
        self.splits[layer.name] = split
        return restriction

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer steps."""
        return [p for update in self.updates.values() for p in update.parameters()]

    def pull_back(self) -> None:
        """From the weights' accumulated gradients to those of what is trained."""
        for update in self.updates.values():
            update.pull_back()
        for layer in self._fixed:
            layer.weight.grad = None

    def push_forward(self) -> None:
        """From what is trained, which has just moved, to the weights."""
        for update in self.updates.values():
            update.push_forward()

    def state_dict(self) -> dict[str, Any]:
        """The splits, which need not come out the same again, and what is trained."""
        return {
            "splits": {
                name: [s.values, s.U_h, s.V_h, s.U_l, s.V_l] for name, s in self.splits.items()
            },
            "trained": {
                name: [p.detach() for p in u.parameters()] for name, u in self.updates.items()
            },
        }

    @torch.no_grad()
    def load_trained(self, state: Mapping[str, Any]) -> None:
        """What is trained, from :meth:`state_dict`, in splits that are known."""
        for name, values in state["trained"].items():
            for parameter, value in zip(self.updates[name].parameters(), values, strict=True):
                parameter.copy_(value)
