"""All that is known of a task in somebody else's loop: a sample, and its position."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from cl_bench.contracts import Batch, Data, Origin, Task, UsageError

Sample = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""Inputs ``x``, a pair ``(x, y)``, or tensors by name: what a model and its loss take."""


class SampledTask(Task):
    """A task of somebody else's loop: all that is known of it is a sample and its position.

    Args:
        sample: inputs, ``(inputs, labels)``, or tensors by name.
        index: position of the task, from 0.

    Raises:
        UsageError: the sample is none of these, is empty, or its tensors differ in length.
    """

    origin = Origin(source="given by the caller", licence="unknown", citation="")
    head = 0
    classes = range(0)

    def __init__(self, sample: Sample, index: int) -> None:
        self.batch = as_batch(sample)
        self.index = index
        self.name = f"task_{index}"

    @property
    def train(self) -> Data:
        """The sample."""
        return _Rows(self.batch)

    @property
    def validation(self) -> Data:
        """Nothing."""
        return _Rows({name: value[:0] for name, value in self.batch.items()})

    @property
    def test(self) -> Data:
        """Nothing."""
        return self.validation


class _Rows(Data):
    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(next(iter(self.batch.values())))

    def __getitem__(self, index: Tensor) -> Batch:
        return {name: value[index.to(value.device)] for name, value in self.batch.items()}


def as_batch(sample: Sample) -> Batch:
    """The sample as named tensors; see :class:`SampledTask`."""
    if isinstance(sample, Tensor):
        batch = {"x": sample}
    elif isinstance(sample, Mapping):
        batch = dict(sample)
    elif isinstance(sample, tuple | list) and len(sample) == 2:
        batch = {"x": sample[0], "y": sample[1]}
    else:
        batch = {}
    if not batch or not all(isinstance(value, Tensor) and value.dim() for value in batch.values()):
        raise UsageError(
            f"sample={type(sample).__name__}: give tensors of some of the task's training data, "
            "sample=x, sample=(x, y) or sample={'input_ids': ..., ...}"
        )
    lengths = {name: len(value) for name, value in batch.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise UsageError(f"sample: every tensor needs as many rows as samples, got {lengths}")
    return batch
