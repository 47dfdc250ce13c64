"""How much a learner is made to compute: for comparing methods at equal cost."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from cl_bench.contracts import Batch


@dataclass
class Work:
    """Passes through the network that training and the strategy asked for.

    Evaluation, and whoever watches the run, do not count; nor does what a strategy computes without
    the learner, such as the passes of a copy that it makes by itself.

    Attributes:
        forward_passes: batches.
        forward_samples: samples in them.
        backward_passes: batches.
        backward_samples: samples in them.
    """

    forward_passes: int = 0
    forward_samples: int = 0
    backward_passes: int = 0
    backward_samples: int = 0
    _paused: bool = field(default=False, repr=False)

    def both(self, n: int) -> None:
        """A batch of ``n`` samples went forward and will go back."""
        if self._paused:
            return
        self.forward_passes += 1
        self.forward_samples += n
        self.backward_passes += 1
        self.backward_samples += n

    def batch(self, batch: Batch, backward: bool) -> None:
        """A batch goes forward and, perhaps, back."""
        if self._paused:
            return
        n = len(next(iter(batch.values())))
        self.forward_passes += 1
        self.forward_samples += n
        if backward:
            self.backward_passes += 1
            self.backward_samples += n

    def add(self, counts: Mapping[str, int]) -> None:
        """What another process has counted."""
        for name, count in counts.items():
            setattr(self, name, getattr(self, name) + count)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing counts."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def counts(self) -> dict[str, int]:
        """The attributes by name."""
        return {k: v for k, v in asdict(self).items() if not k.startswith("_")}
