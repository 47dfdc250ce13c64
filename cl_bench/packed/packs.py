"""How the batches of an epoch are handed out, several at a time or one."""

from lightning import Trainer
from torch import Tensor

from cl_bench.contracts import Batch, Data, batch_sizes
from cl_bench.data import MemoryData
from cl_bench.subspace import mark_drawn


class Packs:
    """Items of an epoch, each of up to ``size`` batches. With ``size`` 1 an item is a batch.

    Attributes:
        steps: batches in an epoch.

    Args:
        samples: in an epoch.
        batch_size: samples of a batch; the last of an epoch may differ, and is handed out alone.
        size: batches of an item, stacked along a new first dimension if it may be several.
        least: samples that a batch needs; a last one with fewer joins the batch before it.
    """

    def __init__(self, samples: int, batch_size: int, size: int, least: int) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.size = size
        sizes = batch_sizes(samples, batch_size, least)
        self.steps = len(sizes)
        self._full = sizes.count(batch_size)

    def bounds(self, order: Tensor | None = None) -> list[tuple[int, int]]:
        """Start and end of every item, as positions in the epoch's ``order``."""
        whole = self._full * self.batch_size
        stride = self.batch_size * self.size
        bounds = [(start, min(start + stride, whole)) for start in range(0, whole, stride)]
        return bounds if whole == self.samples else [*bounds, (whole, self.samples)]

    def batches_in(self, item: int) -> int:
        """Batches that the ``item``-th thing of an epoch holds; the last ones may hold fewer."""
        left = self._full - item * self.size
        return min(self.size, left) if left > 0 else 1

    def handed_out(self, fetched: Batch, data: Data, index: Tensor | None) -> Batch:
        """An item as the learner gets it: batch by batch where there may be several.

        Args:
            fetched: its samples.
            data: of which they are rows. A first layer may project such rows ahead of their steps
                where the data lies in memory.
            index: which of them; None if they were fetched in another process.
        """
        # A subclass may hand out something else than its tensors.
        if index is not None and type(data) is MemoryData and "x" in data.tensors:
            mark_drawn(fetched["x"], data.tensors["x"], index)
        if self.size == 1:
            return fetched
        count = len(next(iter(fetched.values())))
        width = count if count % self.batch_size else self.batch_size
        return {k: v.reshape(count // width, width, *v.shape[1:]) for k, v in fetched.items()}

    # -- what Lightning's loop, whose step is an item, says and does about optimizer steps ---------

    def planned(self, trainer: Trainer) -> int:
        """Optimizer steps of all the trainer's epochs."""
        steps = int(trainer.estimated_stepping_batches)  # has the trainer count its batches, too
        if self.size == 1:
            return steps
        items = range(int(trainer.num_training_batches))
        return sum(map(self.batches_in, items)) * int(trainer.max_epochs or 1)

    def taken(self, trainer: Trainer, learned: int) -> int:
        """Optimizer steps that were taken, of which the learner counted ``learned``."""
        return int(trainer.global_step) if self.size == 1 else learned

    def end_epoch(self, trainer: Trainer) -> None:
        """Step the schedules that follow epochs, where Lightning leaves that to us."""
        if self.size == 1:
            return
        for config in trainer.lr_scheduler_configs:
            if config.interval == "epoch":
                config.scheduler.step()  # type: ignore[call-arg]
