"""Everything that a run is made of, from its configuration, checked before any work starts."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf, open_dict

from cl_bench.cli.build import (
    build,
    build_backbone,
    build_model,
    build_strategy,
    build_stream,
    build_trainer,
    trainer_options,
)
from cl_bench.cli.effects import check_beside
from cl_bench.cli.optimizers import Built, build_optimizer, check_rule
from cl_bench.cli.settings import (
    NODES,
    SETTINGS,
    RunSettings,
    read_settings,
    sink_factories,
)
from cl_bench.contracts import Strategy, Stream, UsageError, derive_seed
from cl_bench.contracts.options import shown
from cl_bench.experiment import (
    Plateau,
    check_batches,
    check_epochs,
    check_pair,
    check_schedule,
    check_tasks,
    check_trainer,
    check_watch,
    for_search,
    seed_training,
    shares_weights,
)
from cl_bench.experiment.faults import memory_explained
from cl_bench.experiment.identity import SinkFactory
from cl_bench.experiment.reopen import Resume
from cl_bench.experiment.token_batches import token_counts
from cl_bench.experiment.trainers import TrainerFactory
from cl_bench.features import FeatureStream
from cl_bench.federation import Federation, check_federation, check_shares
from cl_bench.learners import BaseLearner
from cl_bench.learners.guards import refuse_half_precision, rounded_to
from cl_bench.parallel.ranks import rank
from cl_bench.streaming import Streaming, check_streaming


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        cfg: the composed configuration.
        command: the command line that leads to it.
        choices: which option of each group was chosen.
        resume: go on with the run in ``cfg.run_dir``.
        given: objects in place of what ``cfg`` says.
        words: the overrides that were typed.
        notes: said where the run begins.
        deterministic: whether only algorithms that give the same bits again will do.
    """

    cfg: DictConfig
    command: str
    choices: Mapping[str, Any]
    resume: Resume
    given: Mapping[str, Any]
    words: Sequence[str]
    notes: Sequence[str]
    deterministic: bool


@dataclass(frozen=True)
class Parts:
    """What a run is made of.

    Attributes:
        settings: plain values.
        strategy: which updates are allowed.
        strategy_name: in tables, companions joined by ``+``.
        trainer: builds a ``lightning.Trainer``.
        stream: the tasks; those that are left of them in a trial of a search.
        federation: settings of clients and server; None where there are none.
        streaming: of a stream that is met once; None where it is not.
        learner: what learns.
        sinks: each makes a logger beside the files, or None, for the run's directory.
    """

    settings: RunSettings
    strategy: Strategy
    strategy_name: str
    trainer: TrainerFactory
    stream: Stream
    federation: Federation | None
    streaming: Streaming | None
    learner: BaseLearner
    sinks: Sequence[SinkFactory]


def prepare(asked: Request, planned: bool = False) -> Parts:
    """Everything that a run is made of, checked, the cheap things first.

    Args:
        asked: the configuration, and how it came about.
        planned: whether the network is to have shapes and no numbers (torch's meta device).

    Raises:
        UsageError: something is not what it must be, or does not go with something else.
    """
    cfg, given = asked.cfg, asked.given
    settings = read_settings(cfg)
    if not isinstance(cfg.get("selected"), DictConfig | None):
        raise UsageError(f"selected={cfg.selected}: that is for the command line")
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    sinks = sink_factories(cfg.logger, plain)
    # A threshold of 1.7 should not wait for the data.
    strategy, name = build_strategy(
        cfg,
        str(asked.choices.get("strategy", "strategy")),
        given.get("strategy"),
        str(asked.choices.get("adapter", "adapter")),
    )
    options = trainer_options(cfg.trainer, asked.deterministic)
    plain_loop = "federation" in cfg or "engine" in cfg
    check_trainer(cfg.trainer, 1 if plain_loop else settings.loop.pack, strategy)
    check_schedule(strategy, settings.loop.schedule)
    trainer = build_trainer(options)
    optimizer = (
        Built.given(given["optimizer"]) if "optimizer" in given else build_optimizer(cfg.optimizer)
    )
    stream, federation, streaming = _tasks(asked, settings, strategy, name)
    # Where weights are shared out, process 0 hands the others their parts.
    waits = shares_weights(cfg.trainer) and rank() > 0 and "model" not in given
    with torch.device("meta") if planned or waits else nullcontext():
        learner = _learner(asked, settings, stream, optimizer.factory)
    if _keeps_masters(cfg.trainer, strategy, learner):
        with open_dict(options):
            options.precision = "32-true"
        trainer = build_trainer(options)
    check_rule(optimizer, learner, options, federation is not None)
    parts = Parts(settings, strategy, name, trainer, stream, federation, streaming, learner, sinks)
    _check_learner(asked, parts)
    return parts


def _tasks(
    asked: Request, settings: RunSettings, strategy: Strategy, name: str
) -> tuple[Stream, Federation | None, Streaming | None]:
    """The stream, and who learns it: the strategy can."""
    cfg, given = asked.cfg, asked.given
    with memory_explained(settings.loop, settings.evaluation.batch_size):
        stream = given["stream"] if "stream" in given else build_stream(cfg.stream, strategy)
        if "backbone" in cfg:
            stream = FeatureStream(stream, build_backbone(cfg.backbone), _say)
        stream = for_search(stream, settings.search)
    federation = build(cfg.federation) if "federation" in cfg else None
    streaming = build(cfg.engine) if "engine" in cfg else None
    if federation is not None and streaming is not None:
        raise UsageError("+engine=streaming and +federation=...: a run has one of them")
    schedule = settings.loop.schedule
    check_pair(name, strategy, stream, federation is not None, streaming is not None)
    if streaming is not None:
        check_streaming(streaming, name, strategy, stream, cfg.trainer, schedule)
    elif federation is None:
        check_epochs(strategy, stream, cfg.trainer.max_epochs)
    else:
        check_federation(federation, name, strategy, stream, cfg.trainer, schedule)
    check_tasks(stream, validated=isinstance(schedule, Plateau))
    return stream, federation, streaming


def _say(line: str) -> None:
    """What takes long before there is a display; said by one of several processes."""
    if rank() == 0:
        print(line, flush=True)


def _learner(asked: Request, settings: RunSettings, stream: Stream, optimizer: Any) -> BaseLearner:
    cfg, given, loop = asked.cfg, asked.given, settings.loop
    seed_training(derive_seed(loop.seed, "model"))
    with memory_explained(loop, settings.evaluation.batch_size):
        model = given["model"] if "model" in given else build_model(cfg.model, stream)
        learner: BaseLearner = build(
            cfg.learner,
            stream=stream,
            model=model,
            optimizer=optimizer,
            batch_size=loop.batch_size,
            seed=loop.seed,
            pack=loop.pack,
        )
    return learner


def _keeps_masters(trainer: DictConfig, strategy: Strategy, learner: BaseLearner) -> bool:
    """Whether the weights are masters of what passes see; they are from now on."""
    masters = trainer.get("masters", "auto")
    if not isinstance(masters, bool) and masters != "auto":
        raise UsageError(f"trainer.masters={shown(masters)}: use auto, true or false")
    kind = rounded_to(masters, strategy, learner, str(trainer.get("precision", "32-true")))
    if kind is not None:
        learner.keep_masters(kind)
    return kind is not None


def _check_learner(asked: Request, parts: Parts) -> None:
    """Whether the learner goes with everything else."""
    cfg, settings, strategy = asked.cfg, parts.settings, parts.strategy
    evaluation, loop = settings.evaluation, settings.loop
    if parts.learner.rounding is None:
        refuse_half_precision(strategy, parts.learner, str(cfg.trainer.get("precision")))
    check_beside(cfg, asked.words, _made_of(cfg))
    check_watch(parts.stream, parts.learner, **settings.watched)
    strategy.check(parts.learner)
    check_batches(
        parts.stream,
        parts.learner,
        loop.batch_size,
        {
            "eval.batch_size": evaluation.batch_size,
            "eval.max_samples": evaluation.max_samples,
            "eval.dense_samples": evaluation.dense_samples if evaluation.dense else None,
        },
        isinstance(loop.schedule, Plateau),
    )
    if loop.batch_tokens is not None:
        parts.learner.tokens(parts.learner.example())  # or it reads no text
        for task in parts.stream:
            token_counts(parts.learner, task.train, loop.batch_tokens, task.name)
    if parts.federation is not None and parts.learner.need_company:
        check_shares(parts.federation, parts.stream, loop.seed)


def _made_of(cfg: DictConfig) -> dict[str, Callable[..., Any]]:
    """What parts of the configuration, which all have been made by now, are made into."""
    groups = [f"{group}.{name}" for group in ("also", "probe") for name in cfg.get(group) or ()]
    places = [*NODES, "federation", "engine", "backbone", "adapter", *groups]
    nodes = {place: OmegaConf.select(cfg, place) for place in places}
    targets = {
        place: get_object(node._target_)
        for place, node in nodes.items()
        if isinstance(node, DictConfig) and "_target_" in node
    }
    return {**targets, **SETTINGS}
