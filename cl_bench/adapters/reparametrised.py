"""A linear map whose weight is a function of the weight it had and of a few parameters.

What no library has stands on this: a configuration says which parameters (one file a method), and
:class:`Reparametrised` stands in the layer's place. It looks like a layer of PEFT's to whoever
asks, so that the rest of the package knows one kind of adapter.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cl_bench.contracts import UsageError
from cl_bench.subspace import LinearMap

if TYPE_CHECKING:
    from cl_bench.contracts import Learner, Task

NAME = "own"
"""What PEFT would call the adapter."""


class Reparametrised(nn.Module):
    """Computes what ``base`` does with the weight W + :meth:`change`, W (o, d) as it is.

    Args:
        base: a linear layer, or a convolution of one group.

    Raises:
        UsageError: a convolution of several groups.
    """

    adapter_layer_names: tuple[str, ...] = ()
    active_adapters = (NAME,)

    def __init__(self, base: LinearMap) -> None:
        super().__init__()
        if base.groups != 1:
            raise UsageError(
                f"adapter: layer {base.name.partition('#')[0]!r} is a convolution in groups, which "
                "has no one matrix; leave it out of adapter.targets"
            )
        self.base_layer = base.module
        self._map = base
        self.merged = False
        self._disable_adapters = False

    @abstractmethod
    def change(self) -> Tensor:
        """What is added to W (o, d); zero at the start."""

    @property
    def weight(self) -> Tensor:
        """The layer's own, for networks that ask for its type."""
        return self._map.weight

    @property
    def bias(self) -> Tensor | None:
        """The layer's own."""
        return self._map.bias

    def get_base_layer(self) -> nn.Module:
        """As of PEFT's layers."""
        return self.base_layer

    def get_delta_weight(self, name: str) -> Tensor:
        """What is added to the layer's weight, in its shape."""
        change = self.change()
        weight = self._map.weight
        return change.t() if self._map.transposed else change.reshape(weight.shape)

    @torch.no_grad()
    def merge(self) -> None:
        """W <- W + change."""
        self._map.weight.add_(self.get_delta_weight(NAME))
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """W <- W - change, up to rounding."""
        self._map.weight.sub_(self.get_delta_weight(NAME))
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        """What the layer makes of ``x``."""
        if self.merged or self._disable_adapters:
            return self.base_layer(x)  # type: ignore[no-any-return]
        weight = self._map.weight + self.get_delta_weight(NAME)
        out: Tensor = functional_call(self.base_layer, {"weight": weight}, (x,))
        return out


class Reparametrisation:
    """A configuration: which layers it makes of a network's.

    Attributes:
        sampled: whether :meth:`look` wants data.
    """

    sampled = False

    def look(
        self, learner: "Learner", task: "Task", maps: Sequence[LinearMap], samples: int
    ) -> Mapping[str, Tensor]:
        """What layers are made from beside their weights, by layer; nothing by default.

        Called before the network's weights are frozen.
        """
        return {}

    @abstractmethod
    def layer(self, base: LinearMap, seen: Tensor | None) -> Reparametrised:
        """The layer in ``base``'s place; random numbers are torch's.

        Args:
            base: a layer.
            seen: of :meth:`look`; None where nobody looked, as whoever loads a state does not.
        """


def top(matrix: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (o, r), S (r) and V^T (r, d) of the ``r`` largest singular values.

    Raises:
        ValueError: there are fewer.
    """
    if r > min(matrix.shape):
        raise ValueError(f"r={r}: a layer has {min(matrix.shape)} singular values")
    U, S, Vt = torch.linalg.svd(matrix.detach().float(), full_matrices=False)
    u, s, v = (t.to(matrix.dtype).contiguous() for t in (U[:, :r], S[:r], Vt[:r]))
    return u, s, v


def kept(module: nn.Module, **tensors: Tensor) -> None:
    """Buffers that follow from the weight, and so are in no state."""
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor.detach().clone(), persistent=False)
