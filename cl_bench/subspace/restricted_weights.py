"""The weights of some layers while each of them keeps its leading singular triplets."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_bench.subspace.linear_maps import LinearMap
from cl_bench.subspace.owners import Owned, Owners
from cl_bench.subspace.restricted import (
    CoreUpdate,
    FactorUpdate,
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
        owners: who holds which matrix whole.

    Attributes:
        splits: by layer, what it keeps: of the layers whose matrices this process holds whole.
        updates: likewise, what they learn through; none where nothing is left to learn.
        names: of all layers that keep something, whoever holds them; by :meth:`settle`.
        settled: whether that was called.
    """

    def __init__(
        self, kind: Kind, parametrisation: Parametrisation, owners: Owners | None = None
    ) -> None:
        self.kind: Kind = kind
        self.parametrisation: Parametrisation = parametrisation
        self.owners = owners or Owners()
        self.splits: dict[str, Split] = {}
        self.updates: dict[str, RestrictedUpdate] = {}
        self.names: frozenset[str] = frozenset()
        self.settled = False
        self._learning: list[LinearMap] = []  # those that have an update, whoever holds it
        self._taken: list[LinearMap] = []  # whose weights no optimizer steps

    def keep(self, layer: LinearMap, split: Split, start: Tensor) -> Restriction:
        """From now on ``layer`` keeps the leading triplets of ``start``, W_0 (n, m).

        Raises:
            ValueError: the layer's weight cannot learn so.
        """
        restriction = Restriction(split, self.kind)
        if restriction.free or layer.stacked:  # other experts learn in the same weight
            update = restricted_update(layer, restriction, start, self.parametrisation)
            self.updates[layer.name] = update
        self.splits[layer.name] = split
        return restriction

    def settle(self) -> None:
        """Every layer is with :meth:`keep` that is to be; all processes call it."""
        learns = {name: name in self.updates for name in self.splits}
        everywhere = self.owners.told(learns)
        layers = [m for m in self.owners.layers.values() if m.name in everywhere]
        self._learning = [m for m in layers if everywhere[m.name]]
        dense = self.parametrisation == "dense_projected"
        self._taken = [m for m in layers if not (dense and everywhere[m.name])]
        self.names, self.settled = frozenset(everywhere), True

    @property
    def learns(self) -> bool:
        """Whether anything is left to learn in any layer, whoever holds it."""
        return bool(self._learning)

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer steps, of the layers whose matrices this process holds whole."""
        return [p for update in self.updates.values() for p in update.parameters()]

    def parameter_names(self) -> list[str]:
        """What :meth:`parameters` go by wherever they are: their layer's name, numbered."""
        return [f"{n}/{i}" for n, u in self.updates.items() for i in range(len(u.parameters()))]

    def pull_back(self) -> None:
        """From the weights' accumulated gradients to those of what is trained."""
        if self.owners.apart:
            for update in self.updates.values():
                assert isinstance(update, CoreUpdate | FactorUpdate)
                update.take(None)
            for name, G in self.owners.gradients(self._learning):
                update = self.updates[name]
                assert isinstance(update, CoreUpdate | FactorUpdate)
                update.take(G)
        else:
            for update in self.updates.values():
                update.pull_back()
        for layer in self._taken:
            layer.weight.grad = None

    def push_forward(self) -> None:
        """From what is trained, which has just moved, to the weights."""
        if not self.owners.apart:
            for update in self.updates.values():
                update.push_forward()
            return

        def made(name: str) -> Tensor:
            update = self.updates[name]
            assert isinstance(update, CoreUpdate | FactorUpdate)
            return update.made()

        self.owners.store(self._learning, made)

    def state_dict(self) -> dict[str, Any]:
        """The splits, which need not come out the same again, and what is trained."""
        part = Owned if self.owners.apart else dict
        return {
            "splits": part(
                (name, [s.values, s.U_h, s.V_h, s.U_l, s.V_l]) for name, s in self.splits.items()
            ),
            "trained": part(
                (name, [p.detach() for p in u.parameters()]) for name, u in self.updates.items()
            ),
        }

    @torch.no_grad()
    def load_trained(self, state: Mapping[str, Any]) -> None:
        """What is trained, from :meth:`state_dict`, in splits that are known."""
        for name, update in self.updates.items():
            values = state["trained"][name]
            for parameter, value in zip(update.parameters(), values, strict=True):
                parameter.copy_(value)
