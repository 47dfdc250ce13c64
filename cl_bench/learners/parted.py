"""A language model's services on many samples: so many at a time as memory has room for."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cl_bench.contracts import Batch, PromptStream, split_batch
from cl_bench.contracts.learner import Mode, Of, PerSample
from cl_bench.learners.module import BaseLearner
from cl_bench.subspace import Accumulator, LinearMap, Moments

LOGITS = 1 << 30
"""Numbers that a tap has the output layer put out at once (4 GiB in float32)."""


class Parted(BaseLearner):
    """Gradients and second moments of large batches, in parts.

    Attributes:
        prompts: the stream, where it grades answers; None elsewhere.
        config: of the model.
    """

    prompts: PromptStream | None
    config: Any
    _uncut: bool

    @abstractmethod
    def cut(self, batch: Batch) -> Batch:
        """The batch without columns in which no sample has a token."""

    def gradients(
        self,
        batch: Batch,
        of: Of = "loss",
        per_sample: PerSample = False,
        mode: Mode = "eval",
    ) -> dict[str, Tensor]:
        """As for every learner.

        The loss of a batch weighs tokens alike, that of a sample its own tokens: where sequences
        differ in length, the batch's gradient is not the mean of the samples'.
        """
        if not per_sample:
            return self._in_parts(batch, of, mode)
        # Fused attention has no batching rule, and what is cut may not depend on the sample.
        batch, self._uncut = self.cut(batch), True
        try:
            with sdpa_kernel(SDPBackend.MATH):
                return super().gradients(batch, of, per_sample, mode)
        finally:
            self._uncut = False

    def _in_parts(self, batch: Batch, of: Of, mode: Mode) -> dict[str, Tensor]:
        """Gradients of a batch, as many samples at a time as training takes; means are weighed."""
        parts = list(split_batch(batch, self.batch_size))
        # What is no mean cannot be weighed, and dropout is drawn for a batch.
        if len(parts) == 1 or callable(of) or mode == "train":
            return super().gradients(batch, of, mode=mode)
        sizes = [self.loss_terms(p) if of == "loss" else len(p["labels"]) for p in parts]
        found: dict[str, Tensor] = {}
        for part, size in zip(parts, sizes, strict=True):
            for name, gradient in super().gradients(part, of, mode=mode).items():
                weighed = gradient * (size / (sum(sizes) or 1))
                found[name] = found[name] + weighed if name in found else weighed
        return found

    def tap(
        self,
        layers: Sequence[LinearMap],
        batches: Iterable[Batch],
        into: Mapping[str, Accumulator] | None = None,
        dropout: bool = False,
    ) -> Mapping[str, Moments]:
        """Second moments of the layers' inputs, of a bounded number of tokens at a time."""
        pieces = (piece for batch in batches for piece in self._pieces(batch))
        return super().tap(layers, pieces, into, dropout)

    def _pieces(self, batch: Batch) -> Iterator[Batch]:
        """A batch in parts whose logits together are at most :data:`LOGITS`."""
        length = batch["input_ids"].shape[1]
        if self.prompts is not None:
            length += batch["labels"].shape[1]
        most = max(1, LOGITS // (length * self.config.vocab_size))
        return split_batch(batch, most, self.least_batch)
