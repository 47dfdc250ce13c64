"""What surrounds one of Lightning's Trainers: how it is made, seeded, quietened and left."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning import Trainer

from cl_bench.parallel.joining import SRUN

TrainerFactory = Callable[..., Trainer]
"""Builds a Trainer from the callbacks of a task and further arguments."""


def seed_training(seed: int) -> None:
    """Seed the global generators (dropout and the like) for one task."""
    from lightning import seed_everything

    seed_everything(seed % (1 << 32), verbose=False)


@contextmanager
def as_interrupt() -> Iterator[None]:
    """Lightning leaves with ``SystemExit(1)`` after Ctrl-C; let it be a ``KeyboardInterrupt``."""
    try:
        yield
    except SystemExit as left:
        if isinstance(left.__context__, KeyboardInterrupt):
            raise left.__context__ from None
        raise


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without the banners and tips that a Trainer per task would repeat per task."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        # On a cluster's login node, where nobody asked for a job.
        warnings.filterwarnings("ignore", SRUN)
        warnings.filterwarnings("ignore", ".*GPU available but not used.*")
        warnings.filterwarnings("ignore", ".*`validation_step` but have no `val_dataloader`.*")
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
        # What a strategy holds still is in evaluation mode on purpose.
        warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")
        # A task of no epochs.
        warnings.filterwarnings("ignore", ".*`LightningModule.configure_optimizers` returned.*")
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
        try:
            yield
        finally:
            logger.setLevel(level)
