"""Which parameters of a network a strategy guards, holds or lets learn."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from cl_bench.contracts import Protect, UsageError
from cl_bench.contracts.options import shown
from cl_bench.learners.guardable import is_norm, require_guardable
from cl_bench.subspace import LinearMap, linear_maps, plain_modules

EXTRA = "extra."
"""What the names of modules begin with that a strategy has added to the network."""


class Protection:
    """Mixin: what ``protect`` selects, and what is held until the next task.

    Attributes:
        held_norms: normalisation layers whose statistics stay as they are for this task.
        bypassed: layers whose weight the network uses without calling them: nobody sees their
            inputs, so that they are linear maps to nobody.
    """

    held_norms: set[nn.Module]
    bypassed: frozenset[nn.Module] = frozenset()

    @property
    def pretrained(self) -> bool:
        """Whether the network came with weights that know something already."""
        return any(vars(module).get("pretrained", False) for module in self.network.modules())

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The module whose layers strategies see."""

    def is_guarded_head(self, name: str, heads: str) -> bool | None:
        """Whether ``protect.heads`` guards this layer; None if it is no head."""
        return None

    def is_own_head(self, name: str) -> bool:
        """Whether the layer or parameter belongs to a head that came with a task."""
        return False

    @property
    def tied(self) -> bool:
        """Whether an embedding shares its weight with another layer, such as an output head."""
        return bool(self._tied_weights())

    def _tied_weights(self) -> set[Tensor]:
        tables = {m for _, m in self._parts() if isinstance(m, nn.Embedding)}
        elsewhere = {
            p for _, m in self._parts() if m not in tables for p in m.parameters(recurse=False)
        }
        return {m.weight for m in tables} & elsewhere

    def hold(self, modules: Iterable[nn.Module]) -> None:
        """Until the next task: no gradients, no optimizer state, running statistics held."""
        for module in modules:
            self._freeze(module.parameters())
            self.held_norms.update(m for m in module.modules() if is_norm(m))
        self.network.train(self.network.training)

    def hold_others(self, kept: Iterable[nn.Parameter], norms: bool) -> None:
        """Until the next task, of what tasks share nothing learns but ``kept``.

        Args:
            kept: parameters that go on to learn.
            norms: whether normalisation layers learn too.
        """
        self._freeze(self.others(kept, norms=True))
        if not norms and self._norms():
            self.hold(self._norms())

    def others(self, kept: Iterable[nn.Parameter], norms: bool) -> list[nn.Parameter]:
        """What :meth:`hold_others` holds."""
        own = set(kept)
        found = [p for norm in self._norms() for p in norm.parameters()] if not norms else []
        for name, module in self._parts():
            if not is_norm(module) and not self.is_own_head(name):
                found += [p for p in module.parameters(recurse=False) if p not in own]
        return found

    def _norms(self) -> list[nn.Module]:
        return [m for _, m in self._parts() if is_norm(m)]

    def _parts(self) -> Iterator[tuple[str, nn.Module]]:
        """The network's modules by name, without those that a strategy has added."""
        for name, module in self.network.named_modules():
            if name != "extra" and not name.startswith(EXTRA):
                yield name, module

    def _freeze(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            parameter.requires_grad_(False)

    def learns(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter learns unless a strategy freezes it."""
        return parameter.requires_grad

    def layers(self, protect: Protect) -> list[LinearMap]:
        """The linear maps that ``protect`` selects.

        A bias that its owner froze for good is part of no map: W alone can change then. Where
        PEFT's adapters train, their factors are layers as well, and what they adapt is none.

        Raises:
            UsageError: it selects none.
        """
        found: list[LinearMap] = []
        known: list[str] = []
        left = self._tied_weights() if protect.tied == "free" else set()
        for name, module in plain_modules(self.network):
            if name.startswith(EXTRA) or module in self.bypassed:
                continue
            maps = linear_maps(name, module, augment=protect.bias == "augmented")
            bias = maps[0].bias if maps and maps[0].augmented else None
            if isinstance(bias, nn.Parameter) and not self.learns(bias):
                maps = linear_maps(name, module)
            known += [name] if maps else []
            maps = [m for m in maps if m.weight not in left]
            if self.is_guarded_head(name, protect.heads) is not False:
                found += [m for m in maps if protect.matches(m.name.partition("#")[0])]
        adapters = self._adapters(protect)
        if adapters:
            trained = [m for m in found if self.learns(m.weight) or m.augmented]
            found = trained + adapters
        if not found and (protect.include or protect.exclude):
            option = "include" if protect.include else "exclude"
            remedy = "matches no layer" if protect.include else "leaves no layer to protect"
            raise UsageError(
                f"strategy.protect.{option}={shown(getattr(protect, option))} {remedy}; "
                f"the network's layers are {', '.join(known)}"
            )
        return found

    def _adapters(self, protect: Protect) -> list[LinearMap]:
        """Maps inside adapters that are guarded by themselves; of ours, what they make counts."""
        return []

    def guard(self, protect: Protect, first_task: bool) -> None:
        """Apply ``protect``'s policy on what is no linear map to the current task."""
        if first_task:
            return
        self._freeze(self._frozen_later(protect))
        if protect.norm == "frozen_after_first":
            self.hold(self._norms())

    def _frozen_later(self, protect: Protect) -> list[Tensor]:
        """What :meth:`guard` freezes after the first task, normalisation apart."""
        tied = self._tied_weights()
        frozen = protect.tied == "frozen_after_first"
        frozen |= protect.tied == "auto" and self.pretrained
        found = list(tied) if frozen else []
        if protect.embeddings == "frozen_after_first":
            tables = [m.weight for _, m in self._parts() if isinstance(m, nn.Embedding)]
            found += [weight for weight in tables if weight not in tied]
        if protect.bias == "frozen":
            found += [m.bias for m in self.layers(protect) if m.bias is not None]
        return found + (self._rest() if protect.rest == "frozen_after_first" else [])

    def _rest(self) -> list[Tensor]:
        """What is part of no linear map, normalises nothing, embeds nothing and is no head's."""
        known = {m.module for m in self.layers(Protect(heads="always"))}
        return [
            p
            for name, module in self._parts()
            if not (module in known or is_norm(module) or isinstance(module, nn.Embedding))
            and self.is_guarded_head(name, "auto") is not False
            for p in module.parameters(recurse=False)
        ]

    def guarded(self, protect: Protect) -> frozenset[str]:
        """Names of the parameters that ``protect`` keeps: projected, or frozen later on.

        Raises:
            UsageError: no subspace of inputs can guard a layer that it selects.
        """
        maps = self.layers(protect)
        require_guardable(self.network, maps)
        kept: set[Tensor | None] = {m.weight for m in maps}
        kept |= {m.bias for m in maps if m.augmented}
        kept |= set(self._frozen_later(protect))
        if protect.norm == "frozen_after_first":
            kept |= {p for norm in self._norms() for p in norm.parameters()}
        return frozenset(name for name, p in self.network.named_parameters() if p in kept)
