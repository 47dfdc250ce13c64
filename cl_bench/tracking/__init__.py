"""What a run writes and shows: plain files, Weights & Biases, the live display."""

from cl_bench.tracking.files import write_atomically
from cl_bench.tracking.opening import open_record, resume_record
from cl_bench.tracking.progress import ProgressDisplay
from cl_bench.tracking.reading import Run, read_results, read_run
from cl_bench.tracking.record import Record
from cl_bench.tracking.sinks import Sink
from cl_bench.tracking.verify import read_matrix
from cl_bench.tracking.wandb import WandbSink, wandb_sink

__all__ = [
    "ProgressDisplay",
    "Record",
    "Run",
    "Sink",
    "WandbSink",
    "open_record",
    "read_matrix",
    "read_results",
    "read_run",
    "resume_record",
    "wandb_sink",
    "write_atomically",
]
