"""What reports compare runs by: metrics and costs, their names and their units."""

import math

from cl_bench.metrics import further_summaries, summaries

MORE = {key: one for key, one in further_summaries().items() if one.label is not None}
"""What only some runs have."""

METRICS = {
    **{key: (summary.label, summary.better) for key, summary in summaries().items()},
    "intransigence": ("INT", -1),
    "task_aware_acc": ("ACC told", 1),
    **{key: (str(one.label), one.better) for key, one in MORE.items()},
}
"""Name, and whether more (1) or less (-1) is better."""

COSTS = {
    "optimizer_steps": "optimizer steps",
    "forward_samples": "samples forward",
    "backward_samples": "samples backward",
    "wall_seconds": "time",
    "peak_memory_bytes": "peak memory",
    "strategy_bytes": "strategy memory",
    "exemplars": "samples kept",
    "prediction_passes": "passes an answer",
    "prediction_adapters": "adapters in memory",
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
