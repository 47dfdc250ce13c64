"""How a federation is made up and runs; whatever cannot work is refused before any work starts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch.optim import Optimizer

from cl_bench.contracts import FederatedStrategy, Strategy, Stream, UsageError
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, OnlyWith, PartShare, Range, Rate, Share, SomeShare
from cl_bench.contracts.strategy import overrides
from cl_bench.experiment.trainer_checks import check_plain_loop

ServerOptimizer = Callable[[Iterable[Any]], Optimizer]


@checked("federation.")
@dataclass(frozen=True)
class Federation:
    """Clients, rounds, and who gets which data.

    Attributes:
        clients: N, that hold data of a task.
        per_round: m, sampled without replacement in every round; all who hold data if fewer do.
        rounds: of every task, or one number a task.
        local_epochs: a client's epochs in a round, each in an order of its own.
        partition: ``iid``: equal random parts; ``shards`` (McMahan et al., 2017): sorted by label
            and cut, a few shards a client; ``dirichlet`` (Hsu et al., 2019): each class is spread
            over clients by Dirichlet proportions.
        shards_per_client: of a partition by shards.
        alpha: concentration of a Dirichlet partition; small is skewed.
        participation: p, the share of the tasks that a client meets: there are N / p clients, and
            N of them, drawn for every task, hold its data.
        weighting: of the mean over clients: ``uniform``, or by number of ``samples``.
        drop_outs: probability that a sampled client is lost before it has learned anything.
        statistics: who reports statistics at the end of a task: ``all`` that hold its data, or
            those ``sampled`` for the last round.
        secure: ``none``, or ``masked``: a simulation of secure aggregation; see
            :class:`~cl_bench.federation.reducer.MaskedReducer`.
        fraction_bits: of the masked sum's fixed-point numbers.
        server: builds the server's optimizer from its weights, its gradient being the negative
            mean change; None adds the mean change itself.
        engine: ``inprocess``, or ``flower`` (extra): clients answer through Flower.
        superlink: with ``flower``, the connection in Flower's ``config.toml`` to a SuperLink whose
            SuperNodes answer; None is Flower's simulation.
        nodes: with ``flower``, how many to wait for; None is one a client.
        warn_below: share of a layer's input dimensions left to learn in that is worth a warning.

    Raises:
        UsageError: an option out of range.
    """

    clients: Count = 20
    per_round: Count = 10
    rounds: Count | Sequence[Count] = 20
    local_epochs: Count = 1
    partition: Literal["iid", "shards", "dirichlet"] = "iid"
    shards_per_client: Annotated[Count, OnlyWith("partition", ("shards",))] = 2
    alpha: Annotated[Rate, OnlyWith("partition", ("dirichlet",))] = 0.5
    participation: SomeShare = 1.0
    weighting: Literal["uniform", "samples"] = "uniform"
    drop_outs: PartShare = 0.0
    statistics: Literal["all", "sampled"] = "all"
    secure: Literal["none", "masked"] = "none"
    fraction_bits: Annotated[int, Range(least=8, most=48), OnlyWith("secure", ("masked",))] = 32
    server: ServerOptimizer | None = None
    engine: Literal["inprocess", "flower"] = "inprocess"
    superlink: Annotated[str | None, OnlyWith("engine", ("flower",))] = None
    nodes: Annotated[Count | None, OnlyWith("engine", ("flower",))] = None
    warn_below: Share = 0.1

    def __post_init__(self) -> None:
        if self.per_round > self.clients:
            raise UsageError(
                f"per_round={self.per_round}: there are clients={self.clients}; sample at most that"
            )
        if self.engine == "inprocess" and (self.superlink is not None or self.nodes is not None):
            raise UsageError(
                "superlink and nodes are for engine=flower: add federation.engine=flower"
            )

    @property
    def population(self) -> int:
        """All clients, those that sit a task out included."""
        return round(self.clients / self.participation)

    def rounds_of(self, task: int) -> int:
        """Rounds of the task with that index."""
        return self.rounds if isinstance(self.rounds, int) else self.rounds[task]


def check_federation(
    federation: Federation,
    name: str,
    strategy: Strategy,
    stream: Stream,
    trainer: Mapping[str, Any],
    schedule: object = None,
) -> None:
    """Raise :class:`UsageError` if clients could not learn the stream under the strategy.

    Args:
        federation: the settings.
        name: of the strategy.
        strategy: which updates are allowed.
        stream: the tasks.
        trainer: options of the Trainer, of which only ``accelerator`` applies to clients.
        schedule: of the learning rate; None is constant.
    """
    if schedule is not None:
        raise UsageError(
            "schedule=... is for runs of epochs; clients learn at a constant rate: leave it out"
        )
    if len(strategy.members) > 1:
        raise UsageError(
            f"+also=... has no meaning in a federation yet: run {name!r} without companions"
        )
    if not isinstance(strategy, FederatedStrategy):
        raise UsageError(
            f"strategy {name!r} ({type(strategy).__name__}) says that it runs in federations and "
            "is no cl_bench.contracts.FederatedStrategy: make it one"
        )
    if stream.modality == "text":
        raise UsageError(
            f"federations tell classes apart so far, stream {stream.name!r} asks for words"
        )
    if federation.engine == "flower" and strategy.private:
        raise UsageError(
            f"strategy {name!r} has clients remember their own data, which Flower's nodes do not "
            "yet: use federation.engine=inprocess"
        )
    if overrides(strategy, "phases"):
        raise UsageError(
            f"strategy {name!r} trains in phases after a task, a federation has rounds alone: "
            "leave +federation=... out"
        )
    if strategy.private and overrides(strategy, "modules"):
        raise UsageError(
            f"strategy {name!r} gives every client modules of its own, of which the server could "
            "make no mean: leave +federation=... out"
        )
    for t in range(len(stream)):
        plan = strategy.plan(stream, t)
        if plan is None or plan.epochs:
            how = "skips it" if plan is None else f"learns it for {plan.epochs} epochs"
            raise UsageError(
                f"strategy {name!r} plans task {stream[t].name!r} itself ({how}), which in a "
                "federation federation.rounds and federation.local_epochs do: leave "
                "+federation=... out"
            )
        if plan.epochs == 0 and strategy.collects_on == "local":
            raise UsageError(
                f"{strategy.needs.said('collects_on', 'local')} takes statistics in clients' "
                f"models of the last round, and task {stream[t].name!r} has none"
            )
    if overrides(strategy, "after_epoch"):
        raise UsageError(
            f"strategy {name!r} decides after epochs, a federation has rounds: leave "
            "+federation=... out"
        )
    if not isinstance(federation.rounds, int) and len(federation.rounds) != len(stream):
        raise UsageError(
            f"federation.rounds={list(federation.rounds)} has {len(federation.rounds)} entries, "
            f"the stream {len(stream)} tasks: give one number, or one a task"
        )
    if strategy.collects_on == "local" and federation.statistics == "all":
        raise UsageError(
            f"{strategy.needs.said('collects_on', 'local')} takes statistics in the models of the "
            "last round, which only sampled clients have: add federation.statistics=sampled"
        )
    parts, key = federation.clients, "clients"
    if federation.partition == "shards":
        parts, key = parts * federation.shards_per_client, "clients * federation.shards_per_client"
    for task in stream:
        if len(task.train) < parts and federation.partition != "dirichlet":
            raise UsageError(
                f"federation.{key} = {parts}, but task {task.name!r} has {len(task.train)} "
                "training samples: make at most one part a sample"
            )
    check_plain_loop(trainer, "clients learn")
