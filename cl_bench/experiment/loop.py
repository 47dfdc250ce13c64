"""How tasks are fed to an engine."""

from dataclasses import dataclass

from cl_bench.contracts import UsageError
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, Index, Seed
from cl_bench.experiment.plateau import PerStep, Plateau
from cl_bench.learners import ScheduleFactory


@checked("")
@dataclass(frozen=True)
class LoopSettings:
    """How tasks are fed.

    Attributes:
        seed: of everything that training draws.
        batch_size: samples of a batch.
        batch_tokens: of text, tokens of a batch, at most, in the place of ``batch_size``.
        log_steps: batches over which a mean loss is recorded; None records that of epochs alone.
        pack: batches learned by one ``training_step``.
        num_workers: processes that fetch data ahead.
        schedule: of the learning rate within a task: a decay on plateau, one over its steps,
            a factory of one of torch's schedulers, which steps once an epoch, or None for a
            constant rate.
        validation_batch_size: samples of a batch when the validation loss is measured.
    """

    seed: Seed = 0
    batch_size: Count = 32
    pack: Count = 1
    num_workers: Index = 0
    schedule: Plateau | PerStep | ScheduleFactory | None = None
    validation_batch_size: Count = 2000
    batch_tokens: Count | None = None
    log_steps: Count | None = None

    def __post_init__(self) -> None:
        if self.batch_tokens is not None and self.pack > 1:
            raise UsageError(
                f"pack={self.pack}, batch_tokens={self.batch_tokens}: batches that are learned in "
                "one step have equally many samples; use pack=1"
            )
