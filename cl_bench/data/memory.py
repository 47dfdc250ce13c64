"""Data that lies ready in tensors."""

from torch import Tensor

from cl_bench.contracts.stream import Batch


class MemoryData:
    """Samples in memory; a batch is one ``index_select`` a tensor.

    Args:
        tensors: named tensors whose first dimension counts samples, all of one length.

    Raises:
        ValueError: if the lengths differ.
    """

    def __init__(self, tensors: Batch) -> None:
        lengths = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"tensors must have one common length, got {lengths}")
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: Tensor) -> Batch:
        """The samples at ``index`` (int64, one dimension), copied."""
        return {name: tensor.index_select(0, index) for name, tensor in self.tensors.items()}
