"""What a task, a stream, a learner and a strategy promise each other."""

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.learner import Learner, Protect
from cl_bench.contracts.randomness import derive_seed, generator
from cl_bench.contracts.strategy import (
    EpochDecision,
    Needs,
    Progress,
    Statistics,
    Strategy,
    State,
)
from cl_bench.contracts.stream import Batch, Data, Origin, Scenario, Stream, Task

__all__ = [
    "Batch",
    "Data",
    "EpochDecision",
    "Learner",
    "Needs",
    "Origin",
    "Progress",
    "Protect",
    "Scenario",
    "State",
    "Statistics",
    "Strategy",
    "Stream",
    "Task",
    "UsageError",
    "derive_seed",
    "generator",
]
