"""Adapters around layers: put there, read, swapped, merged into the layers, taken off."""

import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cl_bench.adapters.reparametrised import Reparametrisation
from cl_bench.contracts import UsageError
from cl_bench.subspace import LinearMap, is_adapted, merge_adapted

REWRITING: Mapping[str, bool] = {"pissa": True, "olora": True, "corda": True, "eva": False}
"""Starts of PEFT's LoRA that read more than shapes, by how their names begin: whether they write
into the weight of the layer."""

LOOKING = ("corda", "eva")
"""Those among them that look at data."""

State = dict[str, dict[str, Tensor]]
"""Tensors of an adapter by layer, and by name inside the layer."""


def start_of(config: Any) -> str | None:
    """Which of ``REWRITING`` a configuration has."""
    init = getattr(config, "init_lora_weights", None)
    return next((s for s in REWRITING if isinstance(init, str) and init.startswith(s)), None)


def plain_start(config: Any) -> Any:
    """The same configuration, from shapes alone: for whoever loads a state, or counts."""
    if start_of(config) is None:
        return config
    config = copy.deepcopy(config)
    config.init_lora_weights = True
    return config


def whole_names(maps: Sequence[LinearMap]) -> str:
    """For PEFT: a list of names would match ends of names."""
    return "|".join(re.escape(m.name) for m in maps)


def unfit(config: Any, error: Exception) -> UsageError:
    """What to say about a configuration that raised ``error``."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    return UsageError(
        f"adapter.config: {type(config).__name__} does not fit the layers ({said[0]}); change it, "
        "or adapter.targets"
    )


class Attached:
    """An adapter on a network, from now on until :meth:`merge` or :meth:`drop`.

    Only its parameters have gradients then: whoever attaches gives others theirs back.

    Args:
        network: whose layers they are.
        maps: the layers.
        config: of PEFT, or of ours.
        name: of the adapter; PEFT's parameters are known by it.
        seen: what layers of ours are made from beside their weights.

    Raises:
        UsageError: the configuration does not fit the layers.

    Attributes:
        layers: what stands around each layer, by the layer's name.
    """

    def __init__(
        self,
        network: nn.Module,
        maps: Sequence[LinearMap],
        config: Any,
        name: str,
        seen: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.network = network
        self.layers: dict[str, Any] = {}
        self._tuner: Any = None
        try:
            if isinstance(config, Reparametrisation):
                self._put(maps, config, seen or {})
            else:
                self._inject(maps, config, name)
        except (ValueError, TypeError, AssertionError, RuntimeError, KeyError) as error:
            raise unfit(config, error) from error

        for layer in self.layers.values():
            layer.train(network.training)

    def _put(
        self, maps: Sequence[LinearMap], config: Reparametrisation, seen: Mapping[str, Tensor]
    ) -> None:
        self.network.requires_grad_(False)
        for m in maps:
            layer = config.layer(m, seen.get(m.name))
            self._replace(m.name, layer)
            self.layers[m.name] = layer

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self.network.get_submodule(parent), leaf, module)

    def _inject(self, maps: Sequence[LinearMap], config: Any, name: str) -> None:
        from peft import PEFT_TYPE_TO_TUNER_MAPPING

        config = copy.deepcopy(config)
        names = [m.name for m in maps]
        config.target_modules = whole_names(maps)
        with warnings.catch_warnings():
            # PEFT says what it does about GPT-2's transposed weights, about a block of OFT's that
            # does not divide a layer, and about BOFT's kernel for GPUs, which it does without.
            for said in (
                "fan_in_fan_out is set",
                "Invalid `oft",
                "Failed to load the CUDA",
                "Setting b",
            ):
                warnings.filterwarnings("ignore", message=said)
            self._tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](self.network, config, name)
        wanted = set(names)
        self.layers = {
            n: m for n, m in self.network.named_modules() if n in wanted and is_adapted(m)
        }
        missing = [n for n in names if n not in self.layers]
        if missing:
            raise ValueError(f"layer {missing[0]!r} is not one that it adapts")

    def parameters(self) -> list[nn.Parameter]:
        """What trains, each once."""
        found = [p for layer in self.layers.values() for p in layer.parameters() if p.requires_grad]
        return list(dict.fromkeys(found))

    def state(self) -> State:
        """Copies of all its tensors; one that layers share is copied once."""
        copies: dict[int, Tensor] = {}
        return {
            name: {
                key: copies.setdefault(id(tensors[leaf]), tensors[leaf].detach().clone())
                for key, tensors, leaf in _tensors(layer)
            }
            for name, layer in self.layers.items()
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Inverse of :meth:`state`, before an optimizer knows the parameters."""
        for name, layer in self.layers.items():
            for key, tensors, leaf in _tensors(layer):
                if tensors[leaf].shape == state[name][key].shape:
                    tensors[leaf].copy_(state[name][key])
                else:  # a mask with as many places as this layer's share of it
                    tensors[leaf] = _like(tensors[leaf], state[name][key])

    @contextmanager
    def instead(self, state: Mapping[str, Mapping[str, Tensor]]) -> Iterator[None]:
        """Inside, it is the adapter of another ``state``; afterwards the very same as before."""
        before = [
            (tensors, leaf, tensors[leaf], state[name][key])
            for name, layer in self.layers.items()
            for key, tensors, leaf in _tensors(layer)
        ]
        try:
            for tensors, leaf, own, other in before:
                tensors[leaf] = _like(own, other)
            yield
        finally:
            for tensors, leaf, own, _ in before:
                tensors[leaf] = own

    @torch.no_grad()
    def merge(self) -> None:
        """Into the layers' weights; then it is gone. PEFT's ``unload`` alone would lose it."""
        for layer in self.layers.values():
            merge_adapted(layer)
        self.drop()

    def drop(self) -> None:
        """Take it off. A start that has changed the layers' weights leaves them so."""
        if self._tuner is not None:
            self._tuner.unload()
        else:
            for name, layer in self.layers.items():
                self._replace(name, layer.base_layer)
        self.layers = {}


def _tensors(layer: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Of an adapter around a layer: each tensor's name, what holds it, and its name there."""
    for key in layer.state_dict():
        if not key.startswith("base_layer."):
            path, _, leaf = key.rpartition(".")
            holder = layer.get_submodule(path)
            yield key, holder._parameters if leaf in holder._parameters else holder._buffers, leaf


def _like(own: Tensor, other: Tensor) -> Tensor:
    new = other.detach().to(own.device, own.dtype, copy=True)
    learns = isinstance(own, nn.Parameter)
    return nn.Parameter(new, requires_grad=own.requires_grad) if learns else new
