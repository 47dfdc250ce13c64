"""What of somebody else's network is guarded, and what is held still until a task ends."""

from collections.abc import Iterable
from functools import partial

from torch import nn

from cl_bench.contracts import Protect, UsageError
from cl_bench.learners.guardable import is_norm, require_guardable
from cl_bench.learners.protection import EXTRA
from cl_bench.learners.stages import Stages
from cl_bench.subspace import LinearMap, is_adapted, linear_maps


class Protected(Stages):
    """Mixin: adapters that the owner has put there are guarded by their factors."""

    _model: nn.Module

    def layers(self, protect: Protect) -> list[LinearMap]:
        """The linear maps that ``protect`` selects.

        Raises:
            UsageError: there are none, or no subspace of inputs can guard one of them.
        """
        found = super().layers(protect)
        if not found:
            raise UsageError(
                f"{type(self._model).__name__} has no linear or convolutional layer to protect: "
                "build the network in its constructor, not later"
            )
        require_guardable(self._model, found)
        return found

    def _adapters(self, protect: Protect) -> list[LinearMap]:
        """The linear maps inside PEFT's adapters that train, by the adapter's or the layer's name.

        A pair's output B A x stays where A does the same to x, and B to A x.
        """
        found: list[LinearMap] = []
        for name, module in self.network.named_modules():
            if not is_adapted(module) or name.startswith(EXTRA):
                continue
            for part, inner in module.named_modules():
                own = part and not part.startswith("base_layer")
                maps = linear_maps(f"{name}.{part}", inner) if own else []
                chosen = protect.matches(name) and protect.matches(f"{name}.{part}")
                chosen = chosen or (bool(protect.include) and protect.matches(f"{name}.{part}"))
                if maps and chosen and self.learns(maps[0].weight):
                    found += maps
        return found

    def hold(self, modules: Iterable[nn.Module]) -> None:
        """Until the end of the task: no gradients, running statistics held."""
        for module in modules:
            self._freeze(module.parameters())
            self._hold_norms([m for m in module.modules() if is_norm(m)])

    def _hold_norms(self, norms: Iterable[nn.Module]) -> None:
        for norm in norms:
            if norm not in self.held_norms:
                self.held_norms.add(norm)
                _stay_in_eval(norm, norm.training)
                # The user's own model.train() comes later. Forward hooks would not do: a
                # compiled network ignores those that are registered after its compilation.
                norm.__dict__["train"] = partial(_stay_in_eval, norm)

    def _free_norms(self, norms: Iterable[nn.Module]) -> None:
        for norm in norms:
            self.held_norms.discard(norm)
            del norm.__dict__["train"]
            norm.training = norm.__dict__.pop("mode_asked_for")


def _stay_in_eval(norm: nn.Module, mode: bool = True) -> nn.Module:
    norm.__dict__["mode_asked_for"] = mode
    norm.training = False
    return norm
