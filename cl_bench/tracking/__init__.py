"""What a run writes and shows: plain files, Weights & Biases, the live display."""

from cl_bench.tracking.files import write_atomically
from cl_bench.tracking.progress import ProgressDisplay
from cl_bench.tracking.reading import Run, read_results, read_run
from cl_bench.tracking.record import Record, Sink
from cl_bench.tracking.verify import read_matrix
from cl_bench.tracking.wandb import WandbSink, wandb_sink

__all__ = [
    "ProgressDisplay",
    "Record",
    "Run",
    "Sink",
    "WandbSink",
    "read_matrix",
    "read_results",
    "read_run",
    "wandb_sink",
    "write_atomically",
]
