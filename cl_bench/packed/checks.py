"""What needs Lightning's own optimization loop, and is refused with packs."""

from collections.abc import Mapping
from typing import Any

from cl_bench.contracts import UsageError

PLAIN = {
    "accumulate_grad_batches": 1,
    "gradient_clip_val": None,
    "limit_train_batches": None,
    "max_steps": -1,
    "max_time": None,
}
"""Options of the Trainer that only its own loop heeds, with what leaves them out."""


def check_packs(trainer: Mapping[str, Any], size: int, processes: int) -> None:
    """Raise :class:`UsageError` if packs cannot do what is asked.

    Args:
        trainer: the Trainer's arguments.
        size: batches of a pack; with 1 there is nothing to refuse.
        processes: that train together.
    """
    if size == 1:
        return
    rest = f"Lightning's own optimization loop, not packs of {size} batches: add pack=1"
    if processes > 1:
        raise UsageError(f"{processes} processes need {rest}")
    for key, plain in PLAIN.items():
        if trainer.get(key, plain) != plain:
            raise UsageError(f"trainer.{key}={trainer[key]} needs {rest}")
    if str(trainer.get("precision", "32-true")) not in ("32", "32-true", "64", "64-true"):
        raise UsageError(f"trainer.precision={trainer['precision']} needs {rest}")
