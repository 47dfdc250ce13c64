"""Every tensor that is alive, followed from the operation that makes it."""

import gc
import weakref
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """The most bytes that storages have at a time, from the operation that makes one to its end.

    Args:
        small: bytes below which a new tensor is no reason to add everything up.

    Attributes:
        peak: so far.
    """

    def __init__(self, small: int = 1 << 16) -> None:
        super().__init__()
        self.small = small
        self.storages: dict[int, weakref.ref[Any]] = {}
        self.peak = 0
        for thing in gc.get_objects():
            if isinstance(thing, Tensor) and not thing.is_meta:
                self.note(thing)
        self.look()

    def note(self, tensor: Tensor) -> int:
        """Follow a tensor's storage; returns its bytes if it is new."""
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
        if tensor.device.type != "cpu" or type(tensor).__name__ == "FakeTensor":
            return 0
        storage = tensor.untyped_storage()
        known = self.storages.get(id(storage))
        if known is not None and known() is storage:
            return 0
        self.storages[id(storage)] = weakref.ref(storage)
        return storage.nbytes()

    def look(self) -> None:
        """Add everything up."""
        self.peak = max(self.peak, sum(self.sizes()))

    def sizes(self) -> list[int]:
        """Bytes of every storage that there is."""
        found = []
        for key, ref in list(self.storages.items()):
            storage = ref()
            if storage is None:
                del self.storages[key]
            else:
                found.append(storage.nbytes())
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if sum(self.note(t) for t in tree_leaves(out) if isinstance(t, Tensor)) >= self.small:
            self.look()
        return out
