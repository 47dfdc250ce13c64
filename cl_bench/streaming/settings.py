"""How a stream is met once; whatever cannot work is refused before any work starts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cl_bench.contracts import Strategy, Stream, UsageError
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, Index, SomeShare
from cl_bench.contracts.strategy import overrides
from cl_bench.experiment.trainer_checks import check_plain_loop


@checked("engine.")
@dataclass(frozen=True)
class Streaming:
    """Test, then train.

    Attributes:
        warmup: the first samples, which are learned before anything is answered.
        window: samples of the windowed accuracy.
        fading: factor of the faded accuracy, by sample.
        every: samples between two lines of the record.
    """

    warmup: Index = 200
    window: Count = 100
    fading: SomeShare = 0.999
    every: Count = 1000


def check_streaming(
    streaming: Streaming,
    name: str,
    strategy: Strategy,
    stream: Stream,
    trainer: Mapping[str, Any],
    schedule: object = None,
) -> None:
    """Raise :class:`UsageError` if the stream could not be met once under the strategy.

    Args:
        streaming: the settings.
        name: of the strategy.
        strategy: which updates are allowed.
        stream: the tasks.
        trainer: options of the Trainer, of which only ``accelerator`` applies.
        schedule: of the learning rate; None is constant.
    """
    remedy = "leave +engine=streaming out"
    if schedule is not None:
        raise UsageError(
            "schedule=... is for runs of epochs; a stream is learned at a constant rate: leave it "
            "out"
        )
    if stream.modality == "text":
        raise UsageError(
            f"engine=streaming tells classes apart, stream {stream.name!r} asks for words: {remedy}"
        )
    if streaming.warmup >= len(stream[0].train):
        raise UsageError(
            f"engine.warmup={streaming.warmup}: the first task has {len(stream[0].train)} "
            "samples; warm up on fewer"
        )
    if streaming.warmup < strategy.needs.first_batch and strategy.needs.first_batch > 1:
        raise UsageError(
            f"engine.warmup={streaming.warmup}: strategy {name!r} takes its scales from the first "
            f"samples; use at least {strategy.needs.first_batch}"
        )
    for hook, what in (
        ("phases", "trains in phases after a task"),
        ("after_epoch", "decides after epochs"),
    ):
        if overrides(strategy, hook):
            raise UsageError(f"strategy {name!r} {what}, a stream is met once: {remedy}")
    for t, task in enumerate(stream):
        plan = strategy.plan(stream, t)
        if plan is None or plan.epochs is not None or len(plan.data) != len(task.train):
            raise UsageError(
                f"strategy {name!r} plans task {task.name!r} itself, and a stream is met once, "
                f"as it comes: {remedy}"
            )
    check_plain_loop(trainer, "a stream is learned")
