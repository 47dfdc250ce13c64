"""Learning rates of an optimizer that is at work, and a new optimizer in its place."""

from lightning import Trainer
from torch.optim import Optimizer


def rebuild_optimizer(trainer: Trainer) -> None:
    """The optimizer anew, at the rate that the old one had come to."""
    first = trainer.optimizers[0].param_groups[0]
    decayed = first["lr"] / first["initial_lr"] if first["initial_lr"] else 1.0
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    trainer.strategy.setup_optimizers(trainer)
    for config, before in zip(trainer.lr_scheduler_configs, schedulers, strict=True):
        config.scheduler.last_epoch = before.last_epoch
        config.scheduler._step_count = before._step_count
    for group in trainer.optimizers[0].param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * decayed


def set_rates(optimizer: Optimizer, reset: bool, scale: float) -> None:
    """Scale every rate, from its initial value if ``reset``."""
    for group in optimizer.param_groups:
        group["lr"] = (group["initial_lr"] if reset else group["lr"]) * scale
