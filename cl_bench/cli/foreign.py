"""Ranges of options whose classes are not ours, and do not check them themselves."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning import Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cl_bench.contracts import UsageError
from cl_bench.contracts.options import Count, NotNegative, Positive, Range, shown

OPTIMIZER = {
    "lr": NotNegative,
    "momentum": Range(least=0, below=1),
    "dampening": Range(least=0, most=1),
    "betas": Range(least=0, below=1),
    "alpha": Range(least=0, most=1),
    "eps": NotNegative,
    "weight_decay": NotNegative,
}

SCHEDULE = {
    "gamma": Positive,
    "factor": Positive,
    "eta_min": NotNegative,
    "T_max": Range(least=1),
    "step_size": Range(least=1),
    "milestones": Range(least=1),
}

TRAINER = {
    "max_epochs": Count,  # None would be a thousand
    "max_steps": Range(least=1),
    "devices": Range(least=1),
    "num_nodes": Range(least=1),
    "accumulate_grad_batches": Range(least=1),
    "gradient_clip_val": Positive,
    "limit_train_batches": Positive,
}


def ranges_of(target: Callable[..., Any]) -> Mapping[str, Any]:
    """Where the numbers among the options of a class must lie."""
    if not isinstance(target, type):
        return {}
    tables = ((Optimizer, OPTIMIZER), (LRScheduler, SCHEDULE), (Trainer, TRAINER))
    return next((ranges for kind, ranges in tables if issubclass(target, kind)), {})


OWN = "cl_bench sets it itself (its record, display and checkpoints take that place); leave it out"
BY_EPOCHS = "a task is learned for trainer.max_epochs; leave it out"
WHOLE = "would leave test samples out unseen; eval.max_samples says how many are scored"
NOTHING = "has no effect here; leave it out"

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "callbacks",
            "logger",
            "enable_checkpointing",
            "enable_progress_bar",
            "enable_model_summary",
            "num_sanity_val_steps",
            "default_root_dir",
            "log_every_n_steps",
            "enable_autolog_hparams",
            "model_registry",
            "barebones",
        ),
        OWN,
    ),
    **dict.fromkeys(("min_epochs", "min_steps"), BY_EPOCHS),
    "fast_dev_run": "would learn and test a batch of every task; use trainer.limit_train_batches "
    "and eval.max_samples",
    "overfit_batches": "would learn the first samples alone; use trainer.limit_train_batches",
    "limit_test_batches": WHOLE,
    "limit_val_batches": "the validation loss, where there is one, takes all samples; leave it out",
    **dict.fromkeys(
        (
            "limit_predict_batches",
            "val_check_interval",
            "check_val_every_n_epoch",
            "use_distributed_sampler",
            "inference_mode",
            "reload_dataloaders_every_n_epochs",
        ),
        NOTHING,
    ),
}
"""Arguments of the Trainer that are not the user's, each with what to do instead."""


def refuse_foreign(trainer: Mapping[str, Any]) -> None:
    """Raise :class:`UsageError` if an argument of the Trainer is not the user's to give."""
    for key, reason in REFUSED.items():
        if key in trainer:
            raise UsageError(f"trainer.{key}={shown(trainer[key])}: {reason}")
    share = trainer.get("limit_train_batches")
    if isinstance(share, float) and share > 1:
        raise UsageError(
            f"trainer.limit_train_batches={share}: a share in (0, 1], or a whole number of batches"
        )
    if isinstance(trainer.get("profiler"), str):
        raise UsageError(
            f"trainer.profiler={trainer['profiler']}: its report would go to a log that is silent; "
            "name one that writes a file, '+trainer.profiler={_target_: "
            "lightning.pytorch.profilers.SimpleProfiler, dirpath: ., filename: profile}'"
        )
