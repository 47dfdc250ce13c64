"""What is measured: the accuracy matrix with its summaries; updates, features, knowledge."""

from cl_bench.metrics.alignment import (
    relative_change,
    share_inside,
    unprotected_by_chance,
    unprotected_share,
)
from cl_bench.metrics.angles import (
    compare_subspaces,
    flat_cosine,
    null_angle,
    overlap,
    overlap_excess,
    principal_subspace,
    subspace_angles,
)
from cl_bench.metrics.drift import (
    component_angle,
    component_gap,
    drift,
    linear_cka,
    principal_directions,
    shift_in_top,
)
from cl_bench.metrics.dynamics import dynamics, matched, rebound, steps_to_half, trough
from cl_bench.metrics.incremental import (
    ANSWERED,
    by_task_and_by_sample,
    dense_summary,
    min_accuracy,
    recency_bias,
    stability_gap,
    worst_case_accuracy,
)
from cl_bench.metrics.knowledge import alignment_ratio, at_chance, drops, spurious_fraction
from cl_bench.metrics.matrix import (
    TASK_AWARE,
    Matrix,
    diagonal,
    empty_matrix,
    intransigence,
    so_far,
    tasks_learned,
)
from cl_bench.metrics.summaries import summaries, summarise
from cl_bench.metrics.summaries.acc import average_accuracy
from cl_bench.metrics.summaries.average_incremental_accuracy import average_incremental_accuracy
from cl_bench.metrics.summaries.bwt import backward_transfer
from cl_bench.metrics.summaries.forgetting import forgetting, forgetting_per_task
from cl_bench.metrics.summaries.fwt import forward_transfer
from cl_bench.metrics.summaries.learning_accuracy import learning_accuracy

__all__ = [
    "ANSWERED",
    "TASK_AWARE",
    "Matrix",
    "alignment_ratio",
    "at_chance",
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "by_task_and_by_sample",
    "compare_subspaces",
    "component_angle",
    "component_gap",
    "dense_summary",
    "diagonal",
    "drift",
    "drops",
    "dynamics",
    "empty_matrix",
    "flat_cosine",
    "forgetting",
    "forgetting_per_task",
    "forward_transfer",
    "intransigence",
    "learning_accuracy",
    "linear_cka",
    "matched",
    "min_accuracy",
    "null_angle",
    "overlap",
    "overlap_excess",
    "principal_directions",
    "principal_subspace",
    "rebound",
    "recency_bias",
    "relative_change",
    "share_inside",
    "shift_in_top",
    "so_far",
    "spurious_fraction",
    "stability_gap",
    "steps_to_half",
    "subspace_angles",
    "summaries",
    "summarise",
    "tasks_learned",
    "trough",
    "unprotected_by_chance",
    "unprotected_share",
    "worst_case_accuracy",
]
