"""The rounds of a federation, in the place of a Trainer."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cl_bench.contracts import FederatedStrategy, Plan, State, Task, UsageError, generator
from cl_bench.contracts.engine import LayerMetrics
from cl_bench.experiment.interrupts import Interrupts
from cl_bench.experiment.loader import require_labels, require_samples
from cl_bench.experiment.loop import LoopSettings
from cl_bench.experiment.observer import Observer
from cl_bench.experiment.resuming import keep_between
from cl_bench.experiment.scoring import Scorer
from cl_bench.experiment.snapshot import RunState
from cl_bench.experiment.trainers import TrainerFactory
from cl_bench.federation.client import Turn, client_weights, load_weights
from cl_bench.federation.figure import write_partition_figure
from cl_bench.federation.history import History
from cl_bench.federation.partition import Partition, labels_of, partition
from cl_bench.federation.reducer import MaskedReducer, PlainReducer, Reducer
from cl_bench.federation.rounds import Rounds
from cl_bench.federation.scoring import ByClass
from cl_bench.federation.server import ServerOptimizerState, server_end_task, server_step
from cl_bench.federation.settings import Federation
from cl_bench.federation.site import InProcess, Site
from cl_bench.federation.upload import tensor_bytes
from cl_bench.learners import BaseLearner
from cl_bench.tracking import ProgressDisplay, Record

ReducerFactory = Callable[[list[int], int], Reducer]


class FederatedEngine:
    """Learns tasks in rounds: clients fit, the server steps; at the end of a task, statistics.

    Per round: w_k <- client_fit(w, data_k) for sampled clients k; w <- server_step(w, sum_k).
    At the end: server_end_task(sum_k client_statistics(w, data_k)).

    Args:
        learner: the one model instance.
        strategy: which updates are allowed.
        trainer: not used: clients learn in a plain loop.
        settings: seed, batch size.
        observer: watches the run from the side; None means nobody does.
        record: keeps the numbers of every round.
        progress: shows where training stands.
        state: of the run, with its checkpoints; None keeps it without writing any.
        interrupts: signals that wait for a checkpoint; None lets none wait.
        federation: the settings.
        device: where the model instance lives.
        site: where clients are; None takes this process.
        reducer: builds what sums a round's uploads, from its clients and a seed; None takes what
            ``federation.secure`` names.

    Raises:
        UsageError: the observer looks between optimizer steps.
    """

    def __init__(
        self,
        learner: BaseLearner,
        strategy: FederatedStrategy,
        trainer: TrainerFactory | None,
        settings: LoopSettings,
        observer: Observer | None,
        record: Record,
        progress: ProgressDisplay,
        state: RunState | None = None,
        interrupts: Interrupts | None = None,
        *,
        federation: Federation,
        device: str = "cpu",
        site: Site | None = None,
        reducer: ReducerFactory | None = None,
    ) -> None:
        if observer and observer.watches_steps:
            raise UsageError(
                "eval.dense and probe.* look at optimizer steps, a federation has rounds: leave "
                "them out (eval.dense=[], probe.<name>.enabled=false)"
            )
        self.learner = learner.to(device)
        self.strategy = self.learner.strategy = self.learner.acting = strategy
        self.learner.equip(strategy)
        self.settings = settings
        self.observer = observer
        self.record = record
        self.progress = progress
        self.state = state or RunState(learner, strategy, observer, record, None)
        self.state.engine = self
        self.interrupts = interrupts or Interrupts()
        self.federation = federation
        self.site = site or InProcess(learner, strategy, federation)
        self.history = History()
        self._reducer = reducer or self._named_reducer
        self._by_class = ByClass(learner, device)
        self._scorer = Scorer(learner, settings.num_workers, self._by_class.test)

    # -- a task -----------------------------------------------------------------------------------

    def learn(self, task: Task, plan: Plan | None) -> LayerMetrics:
        """Run the task's rounds, and return its numbers per layer.

        Raises:
            UsageError: no samples, labels outside the head, or a loss that is not finite.
        """
        assert plan is not None  # strategies that skip tasks do not run in federations
        data = plan.data
        require_samples(data, task.name, "training")
        require_labels(task)
        learner, strategy, seed = self.learner, self.strategy, self.settings.seed
        split = partition(task, labels_of(data), self.federation, seed)
        self.history.counts[task.index] = split.counts
        self.site.begin(task, data, split)
        try:
            return self._learn(task, plan, split)
        finally:
            learner.seed = seed
            learner.strategy = learner.acting = strategy

    def _learn(self, task: Task, plan: Plan, split: Partition) -> LayerMetrics:
        learner, strategy, f = self.learner, self.strategy, self.federation
        learner.begin(task, strategy, plan.start)
        begun = self.state.resume_task()
        if begun is None and self.observer:
            with learner.work.paused():
                self.observer.before_task(learner, task)
        strategy.release(learner)
        learner.eval()
        weights = client_weights(learner)
        now = Rounds(weights, ServerOptimizerState(f.server, weights), self._reducer([], 0))
        first = 0 if begun is None else now.resume(begun)
        rounds = 0 if plan.epochs == 0 else f.rounds_of(task.index)
        sizes = {k: -(-len(rows) // learner.batch_size) for k, rows in split.rows.items()}
        each = f.local_epochs * sum(sizes.values()) / max(1, len(sizes))
        per_round = round(each * min(f.per_round, len(sizes)))
        self.progress.task(task.index, per_round * rounds, before=per_round * first)
        every = self.state.every_steps
        due = (now.steps // every + 1) * every
        for r in range(first, rounds):
            self._round(task, split, now, r, rounds)
            asked = self.interrupts.requested is not None
            if (now.steps >= due or asked) and r + 1 < rounds:
                learner.seed = self.settings.seed
                inside = now.state_dict(r + 1)
                self.state.save_inside(task.index, r + 1, inside, scheduled=now.steps >= due)
                due = (now.steps // every + 1) * every
                self.interrupts.stop()
        self._end(task, split, now, rounds)
        self.state.optimizer_steps += now.steps
        return self._layers(task)

    def _round(self, task: Task, split: Partition, now: Rounds, r: int, rounds: int) -> None:
        """Some clients fit, the server steps; in a last round, statistics may come along."""
        learner, strategy, traffic = self.learner, self.strategy, now.traffic
        started = time.perf_counter()
        turns = self._participants(
            task.index, r, split.clients, self.federation.per_round, "participants"
        )
        reporting = self._reporting(turns)
        collect = strategy.collects_on == "local" and r == rounds - 1
        clients = [turn.client for turn in reporting]
        reducer = self._reducer(clients, r)
        if collect:
            now.statistics = self._reducer(clients, rounds)
            traffic.memory_down += tensor_bytes(strategy.share("collect")) * len(turns)
        sent = tensor_bytes(now.weights) + tensor_bytes(strategy.share("fit"))
        for report in self.site.fit(reporting, now.weights, collect):
            reducer.add(report.client, report.fit)
            if report.statistics is not None:
                now.statistics.add(report.client, report.statistics)
            self.progress.advance(report.fit.steps)
        learner.work.add(self.site.take_work())
        summed = reducer.result()
        loss = float("nan")
        if summed is not None:
            load_weights(learner, now.weights)
            now.weights = server_step(learner, strategy, now.weights, summed, now.server)
            loss = float(summed.sums["loss"]) / float(summed.sums["terms"])
            now.steps += summed.steps
            traffic.client_seconds += summed.seconds
        load_weights(learner, now.weights)
        traffic.model_down += sent * len(turns)
        traffic.model_up += reducer.received
        self.record.round(
            task=task.index,
            round=r + 1,
            train_loss=loss,
            clients=len(turns),
            dropped=len(turns) - len(reporting),
            steps=0 if summed is None else summed.steps,
            bytes_down=sent * len(turns),
            bytes_up=reducer.received,
            client_seconds=0.0 if summed is None else summed.seconds,
            seconds=time.perf_counter() - started,
        )
        self.progress.say(f"round {r + 1}/{rounds}  loss {loss:.4g}")

    def _end(self, task: Task, split: Partition, now: Rounds, rounds: int) -> None:
        """Statistics, and what the server makes of them."""
        learner, strategy, f = self.learner, self.strategy, self.federation
        weights, statistics, traffic = now.weights, now.statistics, now.traffic
        learner.require_finite()
        share = tensor_bytes(strategy.share("collect"))
        if strategy.collects_on == "global":
            wanted = len(split.clients) if f.statistics == "all" else f.per_round
            last = rounds if f.statistics == "all" else max(0, rounds - 1)
            turns = self._participants(task.index, last, split.clients, wanted, "participants")
            reporting = self._reporting([Turn(t.seed, t.task, rounds, t.client) for t in turns])
            statistics = self._reducer([turn.client for turn in reporting], rounds)
            for client, upload in self.site.statistics(reporting, weights):
                statistics.add(client, upload)
            traffic.memory_down += share * len(turns)
            if share or statistics.received:
                traffic.model_down += tensor_bytes(weights) * len(turns)
        learner.work.add(self.site.take_work())
        summed = statistics.result()
        traffic.statistics_up += statistics.received
        learner.seed = self.settings.seed
        learner.begin(task, strategy)
        load_weights(learner, weights)
        if summed is not None:
            traffic.client_seconds += summed.seconds
            if summed.sums:
                server_end_task(learner, strategy, weights, task, summed.sums)
        strategy.release(learner)
        learner.equip(strategy)
        self.history.add(traffic)
        self.record.federation(
            task=task.index,
            partition=split.version,
            holders=len(split.clients),
            population=f.population,
            rounds=rounds,
            **vars(traffic),
        )

    def _layers(self, task: Task) -> LayerMetrics:
        layers = {name: dict(values) for name, values in self.strategy.metrics().items()}
        full = {
            name: values["capacity_left"]
            for name, values in layers.items()
            if values.get("capacity_left", 1.0) < self.federation.warn_below
        }
        option = self.strategy.needs.options.get("capacity_left")
        remedy = f"; lower strategy.{option} to keep more" if option else ""
        for name, left in full.items():
            what = (
                "is full: it learns no more" if left <= 0 else f"has {left:.1%} of its inputs left"
            )
            self.progress.note(f"warning: layer {name} {what}{remedy}")
        if self.observer:
            with self.learner.work.paused():
                watched = self.observer.after_task(self.learner, task)
            for name, values in watched.items():
                layers.setdefault(name, {}).update(values)
        return layers

    def _participants(
        self, task: int, round: int, holders: Sequence[int], wanted: int, purpose: str
    ) -> list[Turn]:
        seed = self.settings.seed
        order = torch.randperm(len(holders), generator=generator(seed, purpose, task, round))
        drawn = sorted(holders[i] for i in order[:wanted].tolist())
        return [Turn(seed, task, round, client) for client in drawn]

    def _reporting(self, turns: Sequence[Turn]) -> list[Turn]:
        """Those that are not lost."""
        if not self.federation.drop_outs or not turns:
            return list(turns)
        rng = generator(self.settings.seed, "drop-outs", turns[0].task, turns[0].round)
        lost = torch.rand(len(turns), generator=rng) < self.federation.drop_outs
        return [turn for turn, gone in zip(turns, lost.tolist(), strict=True) if not gone]

    def _named_reducer(self, clients: list[int], round: int) -> Reducer:
        if self.federation.secure == "none":
            return PlainReducer()
        seed = Turn(self.settings.seed, self.learner_task, round, -1).derive("masks")
        return MaskedReducer(clients, self.federation.fraction_bits, seed)

    @property
    def learner_task(self) -> int:
        """Index of the task that is being learned."""
        return self.learner.task.index if self.learner.task else -1

    # -- evaluation -------------------------------------------------------------------------------

    @property
    def details(self) -> Mapping[str, Mapping[str, float]]:
        """What the latest evaluation measured beside the scores, by task name."""
        return self._scorer.details

    def evaluate(
        self, tasks: Sequence[Task], batch_size: int, max_samples: int | None
    ) -> dict[str, float]:
        """Mean score of the global model on every task's test data, by task name."""
        return self._scorer.evaluate(tasks, batch_size, max_samples)

    def between_tasks(self, t: int) -> None:
        """All tasks before ``t`` are learned and scored: record what it means for each client."""
        if t > 0:
            self.record.clients(task=t - 1, **self.history.scored(t, self._by_class.scores))
        keep_between(self.state, self.interrupts, t)

    # -- what a run leaves ------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Traffic of the whole run, and what clients forgot."""
        return self.history.summary()

    def remarks(self) -> list[str]:
        """The same for people."""
        return self.history.remarks()

    def figures(self, directory: Path) -> list[Path]:
        """Who held which classes."""
        return [write_partition_figure(directory, self.history.counts, self.federation)]

    def state_dict(self) -> State:
        """What clients remember, and the history of the run."""
        return {"site": self.site.state_dict(), "history": self.history.state_dict()}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.site.load_state_dict(state["site"])
        self.history.load_state_dict(state["history"])
