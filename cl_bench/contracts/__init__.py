"""What a task, a stream, a learner, a strategy and an engine promise each other."""

from cl_bench.contracts.engine import Engine
from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.federated import FederatedStrategy
from cl_bench.contracts.language import IGNORE, Codec, LanguageStream, PromptStream
from cl_bench.contracts.learner import Learner, Position, Protect
from cl_bench.contracts.loss import Loss
from cl_bench.contracts.memory import Memory
from cl_bench.contracts.plan import Phase, Plan
from cl_bench.contracts.randomness import derive_seed, generator
from cl_bench.contracts.strategy import (
    CLASSIFIED,
    LOCAL_OR_FEDERATED,
    EpochDecision,
    Needs,
    Progress,
    State,
    Statistics,
    Strategy,
)
from cl_bench.contracts.stream import (
    Batch,
    Data,
    Origin,
    Pretraining,
    Recovery,
    Scenario,
    Stream,
    Task,
)
from cl_bench.contracts.task import (
    Samples,
    Side,
    Stored,
    augmented,
    batch_sizes,
    held_at_once,
    likewise,
    split_batch,
)

__all__ = [
    "CLASSIFIED",
    "IGNORE",
    "LOCAL_OR_FEDERATED",
    "Batch",
    "Codec",
    "Data",
    "Engine",
    "EpochDecision",
    "FederatedStrategy",
    "LanguageStream",
    "Learner",
    "Loss",
    "Memory",
    "Needs",
    "Origin",
    "Phase",
    "Plan",
    "Position",
    "Pretraining",
    "Progress",
    "PromptStream",
    "Protect",
    "Recovery",
    "Samples",
    "Scenario",
    "Side",
    "State",
    "Statistics",
    "Stored",
    "Strategy",
    "Stream",
    "Task",
    "UsageError",
    "augmented",
    "batch_sizes",
    "derive_seed",
    "generator",
    "held_at_once",
    "likewise",
    "split_batch",
]
