"""How tasks are fed to an engine."""

from dataclasses import dataclass

from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, Index, Seed
from cl_bench.experiment.plateau import Cosine, Plateau
from cl_bench.learners import ScheduleFactory


@checked("")
@dataclass(frozen=True)
class LoopSettings:
    """How tasks are fed.

    Attributes:
        seed: of everything that training draws.
        batch_size: samples of a batch.
        pack: batches learned by one ``training_step``.
        num_workers: processes that fetch data ahead.
        schedule: of the learning rate within a task: a decay on plateau, a cosine over its steps,
            a factory of one of torch's schedulers, which steps once an epoch, or None for a
            constant rate.
        validation_batch_size: samples of a batch when the validation loss is measured.
    """

    seed: Seed = 0
    batch_size: Count = 32
    pack: Count = 1
    num_workers: Index = 0
    schedule: Plateau | Cosine | ScheduleFactory | None = None
    validation_batch_size: Count = 2000
