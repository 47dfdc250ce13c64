"""What reports compare runs by: metrics and costs, their names and their units."""

import math

from cl_bench.metrics import summaries

METRICS = {
    **{key: (summary.label, summary.better) for key, summary in summaries().items()},
    "intransigence": ("INT", -1),
    "task_aware_acc": ("ACC told", 1),
    "last_accuracy_by_sample": ("ACC by sample", 1),
    "average_accuracy_by_sample": ("AIA by sample", 1),
    "recency_bias": ("recency bias", -1),
    "min_acc": ("min-ACC", 1),
    "wc_acc": ("WC-ACC", 1),
    "stability_gap": ("stability gap", -1),
}
"""Name, and whether more (1) or less (-1) is better."""

MORE = {
    "last_accuracy_by_sample": ("ACC by sample", "over all test samples at the end"),
    "average_accuracy_by_sample": (
        "AIA by sample",
        "over all test samples of seen tasks, averaged over the sequence",
    ),
    "recency_bias": ("recency bias", "old tasks' samples taken for the newest task, at the end"),
    "min_acc": ("min-ACC", "lowest score of each old task since learned, evaluated inside tasks"),
    "wc_acc": ("WC-ACC", "newest task at the end and min-ACC of the others"),
    "stability_gap": ("stability gap", "how deep old scores dip inside a task, and come back"),
}
"""What only some runs have: name and meaning."""

COSTS = {
    "optimizer_steps": "optimizer steps",
    "forward_samples": "samples forward",
    "backward_samples": "samples backward",
    "wall_seconds": "time",
    "peak_memory_bytes": "peak memory",
    "strategy_bytes": "strategy memory",
    "exemplars": "samples kept",
    "inference_overhead": "inference overhead",
}


def format_cost(name: str, value: float) -> str:
    """With its unit."""
    if math.isnan(value):
        return "-"
    if name.endswith("seconds"):
        return f"{value:.1f} s" if value < 60 else f"{int(value // 60)}:{int(value % 60):02} min"
    if name.endswith("bytes"):
        for unit in ("B", "kB", "MB", "GB"):
            if value < 1000 or unit == "GB":
                return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
            value /= 1000
    if name == "inference_overhead":
        return f"{value:.2f}x"
    return f"{value:,.0f}"
