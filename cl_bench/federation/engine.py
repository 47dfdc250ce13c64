"""The rounds of a federation, in the place of a Trainer."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_bench.contracts import Data, State, Task, UsageError, generator
from cl_bench.experiment.engine import LayerMetrics, LightningEngine
from cl_bench.experiment.loader import EvalLoader, require_labels, require_samples
from cl_bench.federation.client import Turn, client_weights, load_weights
from cl_bench.federation.fairness import client_forgetting, client_scores, spread
from cl_bench.federation.figure import write_partition_figure
from cl_bench.federation.partition import Partition, labels_of, partition
from cl_bench.federation.reducer import MaskedReducer, PlainReducer, Reducer
from cl_bench.federation.server import ServerOptimizerState, server_end_task, server_step
from cl_bench.federation.settings import Federation
from cl_bench.federation.site import InProcess, Site
from cl_bench.federation.upload import tensor_bytes

ReducerFactory = Callable[[list[int], int], Reducer]


class FederatedEngine(LightningEngine):
    """Learns tasks in rounds: clients fit, the server steps; at the end of a task, statistics.

    Per round: w_k <- client_fit(w, data_k) for sampled clients k; w <- server_step(w, sum_k).
    At the end: server_end_task(sum_k client_statistics(w, data_k)).

    Args:
        args: as :class:`LightningEngine` has them.
        federation: the settings.
        device: where the model instance lives.
        site: where clients are; None takes this process.
        reducer: builds what sums a round's uploads, from its clients and a seed; None takes what
            ``federation.secure`` names.
        directory: of the run, for the figure of the partitions.
    """

    def __init__(
        self,
        *args: Any,
        federation: Federation,
        device: str = "cpu",
        site: Site | None = None,
        reducer: ReducerFactory | None = None,
    ) -> None:
        super().__init__(*args)
        if self.observer and self.observer.watches_steps:
            raise UsageError(
                "eval.dense and probe.* look at optimizer steps, a federation has rounds: leave "
                "them out (eval.dense=[], probe.<name>.enabled=false)"
            )
        self.federation = federation
        self.learner.to(device)
        self.device = device
        self.site = site or InProcess(self.learner, self.strategy, federation)
        self._reducer = reducer or self._named_reducer
        self.history = _History()
        self.state.engine = self
        self._by_class: dict[int, Tensor] = {}

    # -- a task -----------------------------------------------------------------------------------

    def learn(self, task: Task, data: Data | None) -> LayerMetrics:
        """Run the task's rounds, and return its numbers per layer.

        Raises:
            UsageError: no samples, labels outside the head, or a loss that is not finite.
        """
        assert data is not None  # strategies that skip tasks do not run in federations
        require_samples(data, task.name, "training")
        require_labels(task)
        learner, strategy, seed = self.learner, self.strategy, self.settings.seed
        split = partition(task, labels_of(data), self.federation, seed)
        self.history.counts[task.index] = split.counts
        self.site.begin(task, data, split)
        try:
            return self._learn(task, split)
        finally:
            learner.seed = seed
            learner.strategy = strategy

    def _learn(self, task: Task, split: Partition) -> LayerMetrics:
        learner, strategy, f = self.learner, self.strategy, self.federation
        learner.begin(task, strategy)
        begun = self.state.resume_task()
        if begun is None and self.observer:
            with learner.work.paused():
                self.observer.before_task(learner, task)
        strategy.release(learner)
        learner.eval()
        weights = client_weights(learner)
        server = ServerOptimizerState(f.server, weights)
        first, steps, traffic = 0, 0, _Traffic()
        if begun is not None:
            first, steps = begun["round"], begun["steps"]
            traffic = _Traffic(**begun["traffic"])
            if server.optimizer is not None:
                server.optimizer.load_state_dict(begun["server"])
        rounds = f.rounds_of(task.index)
        sizes = {k: -(-len(rows) // learner.batch_size) for k, rows in split.rows.items()}
        each = f.local_epochs * sum(sizes.values()) / max(1, len(sizes))
        per_round = round(each * min(f.per_round, len(sizes)))
        self.progress.task(task.index, per_round * rounds, before=per_round * first)
        every = self.state.every_steps
        due = (steps // every + 1) * every
        statistics = self._reducer([], 0)
        for r in range(first, rounds):
            started = time.perf_counter()
            turns = self._participants(task.index, r, split.clients, f.per_round, "participants")
            reporting = self._reporting(turns)
            collect = strategy.collects_on == "local" and r == rounds - 1
            clients = [turn.client for turn in reporting]
            reducer = self._reducer(clients, r)
            if collect:
                statistics = self._reducer(clients, rounds)
                traffic.memory_down += tensor_bytes(strategy.share("collect")) * len(turns)
            sent = tensor_bytes(weights) + tensor_bytes(strategy.share("fit"))
            for report in self.site.fit(reporting, weights, collect):
                reducer.add(report.client, report.fit)
                if report.statistics is not None:
                    statistics.add(report.client, report.statistics)
                self.progress.advance(report.fit.steps)
            learner.work.add(self.site.take_work())
            summed = reducer.result()
            loss = float("nan")
            if summed is not None:
                load_weights(learner, weights)
                weights = server_step(learner, strategy, weights, summed, server)
                loss = float(summed.sums["loss"]) / float(summed.sums["terms"])
                steps += summed.steps
                traffic.client_seconds += summed.seconds
            load_weights(learner, weights)
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
            asked = self.interrupts.requested is not None
            if (steps >= due or asked) and r + 1 < rounds:
                inside = {
                    "round": r + 1,
                    "steps": steps,
                    "traffic": vars(traffic),
                    "server": server.optimizer.state_dict() if server.optimizer else {},
                }
                learner.seed = self.settings.seed
                self.state.save_inside(task.index, r + 1, inside, scheduled=steps >= due)
                due = (steps // every + 1) * every
                self.interrupts.stop()
        self._end(task, split, weights, statistics, traffic, rounds)
        self.state.optimizer_steps += steps
        return self._layers(task)

    def _end(
        self,
        task: Task,
        split: Partition,
        weights: Mapping[str, Tensor],
        statistics: Reducer,
        traffic: "_Traffic",
        rounds: int,
    ) -> None:
        """Statistics, and what the server makes of them."""
        learner, strategy, f = self.learner, self.strategy, self.federation
        learner.require_finite()
        share = tensor_bytes(strategy.share("collect"))
        if strategy.collects_on == "global":
            wanted = len(split.clients) if f.statistics == "all" else f.per_round
            last = rounds if f.statistics == "all" else rounds - 1
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
        for name, left in full.items():
            what = (
                "is full: it learns no more" if left <= 0 else f"has {left:.1%} of its inputs left"
            )
            self.progress.note(f"warning: layer {name} {what}; lower strategy.eps to keep more")
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

    def _test(self, loaders: Sequence[EvalLoader]) -> None:
        """Score the global model, class by class too."""
        learner = self.learner
        learner.eval()
        learner.test_scores.to(self.device)
        self._by_class = {}
        for i, (task, loader) in enumerate(zip(learner.test_tasks, loaders, strict=True)):
            right = torch.zeros(len(task.classes), dtype=torch.float64)
            count = torch.zeros(len(task.classes), dtype=torch.float64)
            with torch.no_grad():
                for batch in loader:
                    batch = {name: value.to(self.device) for name, value in batch.items()}
                    score = learner.test_step(batch, 0, i).double().cpu()
                    label = batch["y"].cpu() - task.classes.start
                    right.index_add_(0, label, score)
                    count.index_add_(0, label, torch.ones_like(score))
            # The tasks' own data come first, then probes.
            self._by_class.setdefault(task.index, right / count)

    def between_tasks(self, t: int) -> None:
        """All tasks before ``t`` are learned and scored: what it means for each client."""
        if t > 0:
            now = {
                i: client_scores(counts, self._by_class[i])
                for i, counts in self.history.counts.items()
                if i < t and i in self._by_class
            }
            self.history.learned[t - 1] = now[t - 1]
            lost = client_forgetting(self.history.learned, now, t - 1)
            newest = spread(now[t - 1])
            self.history.forgetting = spread(lost)
            self.record.clients(
                task=t - 1,
                forgetting=lost.tolist(),
                newest=now[t - 1].tolist(),
                summary={
                    **{f"forgetting_{k}": v for k, v in self.history.forgetting.items()},
                    **{f"newest_{k}": v for k, v in newest.items()},
                },
            )
        super().between_tasks(t)

    # -- what a run leaves ------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Traffic of the whole run, and what clients forgot."""
        total = vars(self.history.total)
        forgetting = {f"client_forgetting_{k}": v for k, v in self.history.forgetting.items()}
        return {"federation": dict(total), **forgetting}

    def remarks(self) -> list[str]:
        """Lines for people, at the end."""
        t, lost = self.history.total, self.history.forgetting
        up, down = t.model_up + t.statistics_up, t.model_down + t.memory_down
        lines = [
            f"traffic of all clients: {_size(up)} up ({_size(t.statistics_up)} statistics), "
            f"{_size(down)} down ({_size(t.memory_down)} memory); {t.client_seconds:.1f} s computed"
        ]
        if lost and lost["mean"] == lost["mean"]:
            lines.append(
                f"forgetting by client, points: mean {100 * lost['mean']:.1f}, "
                f"worst {100 * lost['highest']:.1f}, least {100 * lost['lowest']:.1f}"
            )
        return lines

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


class _Traffic:
    """Bytes of all clients together, and seconds that they computed."""

    def __init__(
        self,
        model_down: int = 0,
        model_up: int = 0,
        statistics_up: int = 0,
        memory_down: int = 0,
        client_seconds: float = 0.0,
    ) -> None:
        self.model_down = model_down
        self.model_up = model_up
        self.statistics_up = statistics_up
        self.memory_down = memory_down
        self.client_seconds = client_seconds


class _History:
    """What the run has seen so far: splits, scores of clients, traffic."""

    def __init__(self) -> None:
        self.counts: dict[int, Tensor] = {}
        self.learned: dict[int, Tensor] = {}
        self.total = _Traffic()
        self.forgetting: dict[str, float] = {}

    def add(self, traffic: _Traffic) -> None:
        for key, value in vars(traffic).items():
            setattr(self.total, key, getattr(self.total, key) + value)

    def state_dict(self) -> State:
        return {
            "counts": dict(self.counts),
            "learned": dict(self.learned),
            "total": dict(vars(self.total)),
            "forgetting": dict(self.forgetting),
        }

    def load_state_dict(self, state: State) -> None:
        self.counts, self.learned = dict(state["counts"]), dict(state["learned"])
        self.total = _Traffic(**state["total"])
        self.forgetting = dict(state["forgetting"])


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"
