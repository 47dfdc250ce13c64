"""Pairs beside what layers have read of old tasks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cl_bench.contracts import State
from cl_bench.strategies.lowrank.designed import OwnClasses
from cl_bench.subspace import Moments, grow


class BesideOldInputs(OwnClasses):
    """Keeps a basis of every layer's old inputs.

    Attributes:
        memory: M by layer, orthonormal (d, k).
        overlap: ||A M|| / ||A|| of the latest pair, by layer.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.memory: dict[str, Tensor] = {}
        self.overlap: dict[str, float] = {}

    def remember(self, read: Mapping[str, Moments], eps: float) -> None:
        """M grows until it explains a share ``eps`` of what was read."""
        for name, inputs in read.items():
            A, M = self.layers[name].A.detach().double(), self.memory.get(name)
            if M is not None:
                self.overlap[name] = float((A @ M.to(A)).norm() / A.norm().clamp(min=1e-12))
            self.memory[name] = grown(M, inputs, eps)

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Rank of M, the share of inputs beside it, and how far A lies in it: ||A M|| / ||A||."""
        found: dict[str, dict[str, float]] = {}
        for name, M in self.memory.items():
            found[name] = {"rank": M.shape[1], "capacity_left": 1 - M.shape[1] / len(M)}
            if name in self.overlap:
                found[name]["lora_overlap"] = self.overlap[name]
        return found

    def state_dict(self) -> State:
        """M of every layer."""
        return {"memory": dict(self.memory), "overlap": dict(self.overlap)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.memory, self.overlap = dict(state["memory"]), dict(state["overlap"])


def grown(M: Tensor | None, inputs: Moments, eps: float) -> Tensor:
    """[M, U], as GPM grows a basis; at first less the direction that crosses, but never empty."""
    found, _ = grow(M, inputs, eps, below=M is None)
    if found.shape[1] == 0:
        found = inputs.principal()[1][:, :1]
    return found if M is None else torch.cat([M.to(found), found[:, M.shape[1] :]], dim=1)
