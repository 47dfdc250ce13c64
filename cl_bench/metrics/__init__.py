"""What is measured: the accuracy matrix with its summaries, and alignment of updates."""

from cl_bench.metrics.alignment import relative_change, share_inside
from cl_bench.metrics.matrix import (
    SUMMARIES,
    TASK_AWARE,
    Matrix,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    diagonal,
    empty_matrix,
    forgetting,
    forgetting_per_task,
    forward_transfer,
    intransigence,
    learning_accuracy,
    so_far,
    summarise,
    tasks_learned,
)

__all__ = [
    "SUMMARIES",
    "TASK_AWARE",
    "Matrix",
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "diagonal",
    "empty_matrix",
    "forgetting",
    "forgetting_per_task",
    "forward_transfer",
    "intransigence",
    "learning_accuracy",
    "relative_change",
    "share_inside",
    "so_far",
    "summarise",
    "tasks_learned",
]
