"""What crosses from a client to the server: named tensors that mean something as a sum."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cl_bench.contracts import State


@dataclass
class Upload:
    """One client's part of a sum, or the sum.

    Attributes:
        sums: tensors by name; the server may read those of a sum alone.
        steps: optimizer steps that it took.
        seconds: what it took the client to compute.
    """

    sums: Mapping[str, Tensor]
    steps: int = 0
    seconds: float = 0.0

    @property
    def nbytes(self) -> int:
        """Size on the wire, headers aside."""
        return tensor_bytes(self.sums)


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in a nested value, on the wire: each occurrence counts."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(tensor_bytes(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return sum(tensor_bytes(inner) for inner in value)
    return 0


def floating(state: State) -> dict[str, Tensor]:
    """The tensors of a module's state that can be averaged; counters stay where they are."""
    return {name: value for name, value in state.items() if value.is_floating_point()}
