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
from cl_bench.metrics.divergence import divergence
from cl_bench.metrics.drift import (
    component_angle,
    component_gap,
    drift,
    linear_cka,
    principal_directions,
    shift_in_top,
)
from cl_bench.metrics.dynamics import dynamics, matched, rebound, steps_to_half, trough
from cl_bench.metrics.knowledge import alignment_ratio, at_chance, drops, spurious_fraction
from cl_bench.metrics.matrix import (
    ANSWERED,
    TASK_AWARE,
    Matrix,
    diagonal,
    empty_matrix,
    intransigence,
    so_far,
    tasks_learned,
)
from cl_bench.metrics.summaries import (
    further_summaries,
    summaries,
    summarise,
    summarise_further,
)
from cl_bench.metrics.summaries.acc import average_accuracy
from cl_bench.metrics.summaries.average_incremental_accuracy import average_incremental_accuracy
from cl_bench.metrics.summaries.bwt import backward_transfer
from cl_bench.metrics.summaries.forgetting import forgetting, forgetting_per_task
from cl_bench.metrics.summaries.fwt import forward_transfer
from cl_bench.metrics.summaries.learning_accuracy import learning_accuracy
from cl_bench.metrics.summaries.summary import Evidence
from cl_bench.metrics.unlearning import forget_quality, retained_utility, utility_after

__all__ = [
    "ANSWERED",
    "TASK_AWARE",
    "Evidence",
    "Matrix",
    "alignment_ratio",
    "at_chance",
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "compare_subspaces",
    "component_angle",
    "component_gap",
    "diagonal",
    "divergence",
    "drift",
    "drops",
    "dynamics",
    "empty_matrix",
    "flat_cosine",
    "forget_quality",
    "forgetting",
    "forgetting_per_task",
    "forward_transfer",
    "further_summaries",
    "intransigence",
    "learning_accuracy",
    "linear_cka",
    "matched",
    "null_angle",
    "overlap",
    "overlap_excess",
    "principal_directions",
    "principal_subspace",
    "rebound",
    "relative_change",
    "retained_utility",
    "share_inside",
    "shift_in_top",
    "so_far",
    "spurious_fraction",
    "steps_to_half",
    "subspace_angles",
    "summaries",
    "summarise",
    "summarise_further",
    "tasks_learned",
    "trough",
    "unprotected_by_chance",
    "unprotected_share",
    "utility_after",
]
