"""What a run costs beside its time: memory, and what the strategy adds to inference."""

import contextlib
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from cl_bench.contracts import Strategy, Stream
from cl_bench.contracts.strategy import overrides
from cl_bench.experiment.snapshot import tensor_bytes
from cl_bench.learners import BaseLearner

SAMPLES, REPEATS = 256, 15
"""Of the batch that inference is timed on, and how often; the fastest counts."""

PATIENCE_SECONDS = 5.0
"""No repeat begins after so long, though there are two: large networks do not waver as small do."""


class PeakMemory:
    """The most memory that the process held since this object was made.

    On Linux the kernel's mark is reset, so that runs of one process do not add up; elsewhere it is
    that of the whole process.
    """

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> dict[str, Any]:
        """``peak_memory_bytes`` of the process, and ``peak_device_bytes`` where there is one."""
        found = {"peak_memory_bytes": _resident_peak()}
        if torch.cuda.is_available():
            found["peak_device_bytes"] = torch.cuda.max_memory_allocated()
        return found


def _resident_peak() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe_budget(learner: BaseLearner, strategy: Strategy, stream: Stream) -> dict[str, Any]:
    """What a finished run adds to its summary.

    Returns:
        ``forward_passes``, ``forward_samples``, ``backward_passes``, ``backward_samples``;
        ``parameters`` of the network; ``strategy_bytes``, tensors that the strategy keeps, and
        ``exemplars``, how many samples are among them;
        ``prediction_passes``, forward passes that one answer takes, and ``prediction_adapters``,
        how many adapters are in memory for it;
        ``inference_overhead``, time of a forward pass under ``strategy.inference`` over that of
        the bare network.
    """
    return {
        **learner.work.counts(),
        "parameters": sum(p.numel() for p in learner.network.parameters()),
        "strategy_bytes": tensor_bytes(dict(strategy.state_dict())),
        "exemplars": strategy.exemplars,
        "prediction_passes": strategy.passes,
        "prediction_adapters": strategy.adapters,
        "inference_overhead": inference_overhead(learner, strategy, stream),
    }


@torch.no_grad()
def inference_overhead(learner: BaseLearner, strategy: Strategy, stream: Stream) -> float:
    """Time of an answer on the last task as the strategy has it, over the bare network's."""
    if not (overrides(strategy, "inference") or overrides(strategy, "predict")):
        return 1.0
    task = stream[len(stream) - 1]
    batch = learner._to_device(task.sample(SAMPLES, learner.seed))
    known = task if stream.task_id_at_test else None
    training = learner.training
    learner.eval()
    try:
        bare: list[float] = []
        full: list[float] = []
        first = time.perf_counter()
        for _ in range(REPEATS):  # in turns, so that a busy machine slows both
            begun = time.perf_counter()
            if len(full) > 1 and begun - first > PATIENCE_SECONDS:
                break
            learner(batch)
            bare.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            with strategy.inference(learner, known):
                strategy.predict(learner, batch, known)
            full.append(time.perf_counter() - begun)
    finally:
        learner.train(training)
    return min(full) / min(bare)
