"""From a composed configuration to a run."""

import difflib
import functools
import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import torch
from hydra.errors import HydraException
from hydra.utils import get_object, instantiate
from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn
from torch.optim import SGD

from cl_bench.cli.effects import check_beside, check_effects
from cl_bench.cli.foreign import ranges_of, refuse_foreign
from cl_bench.cli.kinds import require_kind, require_made
from cl_bench.cli.threads import AUTO, check_threads, computing_with
from cl_bench.contracts import Engine, Strategy, Stream, UsageError, derive_seed
from cl_bench.contracts.options import Count, Length, Widths, annotations, check, shown
from cl_bench.experiment import (
    AlignmentSettings,
    CheckpointSettings,
    Cosine,
    EvalSettings,
    FeatureSettings,
    GeneralTextSettings,
    Identity,
    LandscapeSettings,
    LightningEngine,
    LoopSettings,
    Plateau,
    ProbeSettings,
    RecoverySettings,
    Result,
    SearchSettings,
    Together,
    UnprotectedSettings,
    UpdateSettings,
    check_batches,
    check_pair,
    check_schedule,
    check_sharded,
    check_tasks,
    check_together,
    check_trainer,
    check_watch,
    conduct,
    for_search,
    new_directory,
    processes,
    quiet_lightning,
    search_facts,
    seed_training,
    shares_weights,
)
from cl_bench.experiment.determinism import deterministically, statement
from cl_bench.experiment.faults import memory_explained
from cl_bench.experiment.reopen import Resume
from cl_bench.federation import FederatedEngine, Federation, check_federation, check_shares
from cl_bench.learners import BaseLearner
from cl_bench.learners.guards import refuse_half_precision
from cl_bench.parallel.ranks import world
from cl_bench.tracking import wandb_sink
from cl_bench.tracking.files import require_plain

Settings = TypeVar("Settings")

NODES = (
    "eval", "alignment", "checkpoint", "strategy", "stream", "model", "optimizer", "schedule",
    "learner", "trainer", "logger",
)  # fmt: skip
"""Parts of a configuration that every run has."""

MADE = ("strategy", "stream", "model", "optimizer", "learner", "trainer")
"""Those of them that name what they are made into."""

HYDRAS = ("_target_", "_partial_", "_convert_", "_recursive_")
"""Keys of a node that are for Hydra, not for the target."""

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
"""What the Trainer must leave to the record and the progress display."""


def run_config(
    cfg: DictConfig,
    command: str,
    choices: Mapping[str, Any],
    resume: Resume = False,
    given: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    words: Sequence[str] = (),
) -> Result:
    """Run one experiment.

    Args:
        cfg: the composed configuration.
        command: the command line that leads to it.
        choices: which option of each group was chosen.
        resume: go on with the run in ``cfg.run_dir``.
        given: objects in place of what ``cfg`` says: ``strategy``, ``stream``, ``model``,
            ``optimizer``, and what makes a federation's ``site`` from the strategy.
        notes: said where the run begins.
        words: the overrides that were typed; those that cannot have an effect are refused.

    Raises:
        UsageError: whatever the user can put right.
    """
    if isinstance(cfg.get("run_dir"), str):
        require_plain(Path(cfg.run_dir))
    _require_nodes(cfg, given or {})
    notes = [*notes, *check_effects(cfg, words)]
    asked = _whole_run(cfg)
    count = processes(cfg.trainer)
    with (
        computing_with(_threads(cfg, resume)),
        deterministically(asked),
        _company(count, _on_cuda(cfg.trainer)),
    ):
        return _run_config(cfg, command, choices, resume, given or {}, asked, words, notes)


def _threads(cfg: DictConfig, resume: Resume) -> int | None:
    """How many threads a run says it wants, or began with; None leaves them as they are."""
    threads = cfg.trainer.get("threads", AUTO)
    check_threads(threads)
    if threads != AUTO:
        return int(threads)
    if resume and cfg.run_dir is not None:
        with suppress(OSError, ValueError, TypeError):
            then = json.loads((Path(cfg.run_dir) / "environment.json").read_text())
            return int(then["threads"]) if "threads" in then else None
    return None


def _company(count: int, on_cuda: bool) -> AbstractContextManager[None]:
    """The other processes of a run that trains in several, where they are there already."""
    if count == 1:
        return nullcontext()
    from cl_bench.parallel.joining import are_there, joined

    return joined(count, on_cuda) if are_there() else nullcontext()


def _run_config(
    cfg: DictConfig,
    command: str,
    choices: Mapping[str, Any],
    resume: Resume,
    given: Mapping[str, Any],
    deterministic: bool,
    words: Sequence[str],
    notes: Sequence[str],
) -> Result:
    seed = cfg.seed
    evaluation = _settings(EvalSettings, cfg.eval)
    loop = LoopSettings(
        seed,
        cfg.batch_size,
        cfg.pack,
        cfg.num_workers,
        schedule=_schedule(cfg.schedule),
        validation_batch_size=evaluation.batch_size,
    )
    alignment = _settings(AlignmentSettings, cfg.alignment)
    probe = _probe(cfg.get("probe"))
    checkpoint = _settings(CheckpointSettings, cfg.checkpoint)
    search = _settings(SearchSettings, cfg.search) if cfg.get("search") else SearchSettings()
    if not isinstance(cfg.get("selected"), DictConfig | None):
        raise UsageError(f"selected={cfg.selected}: that is for the command line")
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    sink = functools.partial(wandb_sink, config=settings, **_logger(cfg.logger))

    # Cheap things first: a threshold of 1.7 should not wait for the data.
    strategy, strategy_name = _strategy(
        cfg, str(choices.get("strategy", "strategy")), given.get("strategy")
    )
    options = OmegaConf.merge(cfg.trainer, {"deterministic": True} if deterministic else {})
    assert isinstance(options, DictConfig)
    with open_dict(options):
        options.pop("threads", None)  # ours, not Lightning's
    refuse_foreign(options)
    with _explained(options):
        _checked(_target(options), options)
    check_trainer(cfg.trainer, 1 if "federation" in cfg else loop.pack, strategy)
    check_schedule(strategy, loop.schedule)
    trainer = _trainer(options)
    optimizer = given["optimizer"] if "optimizer" in given else _optimizer(cfg.optimizer)
    with memory_explained(loop, evaluation.batch_size):
        stream = given["stream"] if "stream" in given else build_stream(cfg.stream, strategy)
        stream = for_search(stream, search)
    told = strategy.needs.task_id_at_test and stream.scenario != "task"
    federation = build(cfg.federation) if "federation" in cfg else None
    stream_name = str(choices.get("stream", stream.name))
    check_pair(strategy_name, strategy, stream, federation is not None)
    if federation is not None:
        check_federation(federation, strategy_name, strategy, stream, cfg.trainer, loop.schedule)
    check_tasks(stream, validated=isinstance(loop.schedule, Plateau))

    seed_training(derive_seed(seed, "model"))
    with memory_explained(loop, evaluation.batch_size):
        model = given["model"] if "model" in given else build_model(cfg.model, stream)
        learner = build(
            cfg.learner,
            stream=stream,
            model=model,
            optimizer=optimizer,
            batch_size=loop.batch_size,
            seed=seed,
            pack=loop.pack,
        )
    refuse_half_precision(strategy, learner, str(cfg.trainer.get("precision")))
    check_beside(cfg, words, _made(cfg))
    watched = {"alignment": alignment, "probe": probe, "evaluation": evaluation, "loop": loop}
    check_watch(stream, learner, **watched)
    strategy.check(learner)
    check_batches(
        stream,
        learner,
        loop.batch_size,
        {
            "eval.batch_size": evaluation.batch_size,
            "eval.max_samples": evaluation.max_samples,
            "eval.dense_samples": evaluation.dense_samples if evaluation.dense else None,
        },
        isinstance(loop.schedule, Plateau),
    )
    if federation is not None and learner.need_company:
        check_shares(federation, stream, seed)
    if federation is not None and federation.engine == "flower" and "site" not in given:
        return _in_flower(cfg, command, choices, resume, given, federation, learner, strategy)
    count = processes(cfg.trainer)
    if shares_weights(cfg.trainer):
        check_sharded(strategy, probe)
    if count > 1 and world() == 1:
        check_together(stream, learner)
        return _in_processes(cfg, command, choices, resume, given, learner, strategy, notes)
    says = statement(deterministic, _on_cuda(cfg.trainer))
    return conduct(
        stream,
        strategy,
        learner,
        trainer,
        Identity(
            stream_name, strategy_name, OmegaConf.to_yaml(cfg, resolve=True), command, choices
        ),
        loop=loop,
        evaluation=evaluation,
        alignment=alignment,
        probe=probe,
        checkpoint=checkpoint,
        run_dir=cfg.run_dir,
        resume=resume,
        sinks=[sink],
        environment={
            "directory": os.getcwd(),
            "processes": count,
            "effective_batch": loop.batch_size * int(cfg.trainer.accumulate_grad_batches),
            "reproducible": says,
        },
        notes=[
            *notes,
            *_idle_schedule(loop.schedule, cfg.trainer.max_epochs, stream),
            *([says] if deterministic else []),
            *([f"{strategy_name} is given the task id at test time"] if told else []),
        ],
        facts={
            **search_facts(stream, search),
            **({"selection": settings["selected"]} if settings.get("selected") else {}),
        },
        engine=_engine(federation, cfg.trainer, strategy, given),
        sharded=shares_weights(cfg.trainer),
    )


def _engine(
    federation: Federation | None,
    trainer: DictConfig,
    strategy: Strategy,
    given: Mapping[str, Any],
) -> Callable[..., Engine]:
    if federation is None:
        return LightningEngine
    return functools.partial(
        FederatedEngine,
        federation=federation,
        device="cuda" if _on_cuda(trainer) else "cpu",
        site=given["site"](strategy) if "site" in given else None,
    )


def _in_flower(
    cfg: DictConfig,
    command: str,
    choices: Mapping[str, Any],
    resume: Resume,
    given: Mapping[str, Any],
    federation: Federation,
    learner: BaseLearner,
    strategy: Strategy,
) -> Result:
    try:
        from cl_bench.cli.flower import simulate, submit
        from cl_bench.federation.flower import as_json
    except ImportError as error:
        raise UsageError(
            f"federation.engine=flower needs the extra: pip install 'cl_bench[flower]' ({error})"
        ) from None
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    nodes = federation.nodes or federation.population
    if federation.superlink is None:
        return simulate(
            lambda site: run_config(cfg, command, choices, resume, {**given, "site": site}),
            as_json(settings, choices),
            nodes,
        )
    if cfg.run_dir is None:
        raise UsageError(
            "the SuperLink's process writes the run: say where, with run_dir=/an/absolute/path"
        )
    return submit(
        as_json(settings, choices),
        command,
        resume,
        federation.superlink,
        nodes,
        Path(cfg.run_dir),
        learner,
        strategy,
    )


def _in_processes(
    cfg: DictConfig,
    command: str,
    choices: Mapping[str, Any],
    resume: Resume,
    given: Mapping[str, Any],
    learner: BaseLearner,
    strategy: Strategy,
    notes: Sequence[str],
) -> Result:
    from cl_bench.cli.together import start

    if given:
        raise UsageError(
            f"trainer.devices={cfg.trainer.devices}: processes of their own cannot be given "
            f"objects ({', '.join(given)}); name them in the configuration, or start the script "
            "itself with torchrun"
        )
    if cfg.trainer.get("num_nodes", 1) > 1:
        raise UsageError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}: start the command on every node with "
            "torchrun or SLURM (docs/several_gpus.md)"
        )
    stream_name = str(choices.get("stream", "stream"))
    names = [str(choices.get("strategy", "strategy")), *(cfg.get("also") or ())]
    identity = Identity(stream_name, "+".join(map(str, names)))
    run_dir = Path(cfg.run_dir) if cfg.run_dir else new_directory(identity, cfg.seed)
    count = processes(cfg.trainer)
    return start(cfg, command, choices, resume, run_dir, count, learner, strategy, notes)


def build_stream(cfg: DictConfig, strategy: Strategy) -> Stream:
    """The stream that a configuration names.

    Where it leaves open whether the task id is known at test time (``task_id_at_test: null``), a
    strategy that needs it is given it, and every score says so.
    """
    left_open = "task_id_at_test" in cfg and cfg.task_id_at_test is None
    told = {"task_id_at_test": True} if left_open and strategy.needs.task_id_at_test else {}
    stream: Stream = build(cfg, **told)
    return stream


def build_model(cfg: DictConfig, stream: Stream) -> nn.Module:
    """The network that a configuration names, for what a stream gives."""
    model: nn.Module = build(cfg, input_shape=stream.input_shape, vocabulary=sum(stream.heads))
    return model


def _require_nodes(cfg: DictConfig, given: Mapping[str, Any]) -> None:
    """Raise :class:`UsageError` if a part of the configuration is missing or empty."""
    for name in (*NODES, *({"probe", "search"} & set(cfg))):  # older runs have none of these
        node = cfg.get(name)
        made = name in MADE and name not in given
        if not isinstance(node, DictConfig) or (made and "_target_" not in node):
            raise UsageError(f"{name} is missing: a run needs it; leave {name}=... or ~{name} out")


def _made(cfg: DictConfig) -> dict[str, Callable[..., Any]]:
    """What parts of the configuration, which all have been made by now, are made into."""
    places = [*NODES, "federation", *(f"also.{name}" for name in cfg.get("also") or ())]
    nodes = {place: OmegaConf.select(cfg, place) for place in places}
    targets = {
        place: get_object(node._target_)
        for place, node in nodes.items()
        if isinstance(node, DictConfig) and "_target_" in node
    }
    probes = {f"probe.{name}": kind for name, kind in PROBES.items()}
    return {**targets, **SETTINGS, **probes}


def _idle_schedule(
    schedule: Plateau | Cosine | Callable[..., Any] | None, max_epochs: int, stream: Stream
) -> list[str]:
    """A warning where no task has epochs enough for the schedule to change anything."""
    epochs = max(max_epochs if task.epochs is None else task.epochs for task in stream)
    if schedule is None or isinstance(schedule, Cosine):
        return []
    if isinstance(schedule, Plateau):
        idle = epochs == 1 or (not schedule.restore_best and epochs <= schedule.patience + 1)
    else:
        optimizer = SGD([nn.Parameter()], lr=1.0)
        scheduler, rates = schedule(optimizer), [optimizer.param_groups[0]["lr"]]
        for _ in range(epochs - 1):
            optimizer.step()
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        idle = len(set(rates)) == 1
    return (
        [f"warning: the schedule changes nothing, as no task has more than {epochs} epochs"]
        if idle
        else []
    )


def _whole_run(cfg: DictConfig) -> bool:
    """Check what concerns the run as a whole; returns whether it is deterministic."""
    top = {k: v for k, v in _plain(cfg, resolve=False).items() if not isinstance(v, str)}
    found = {
        k: top.get(k, cfg.get(k)) for k in inspect.signature(_top_level).parameters if k in cfg
    }
    check(_top_level, found)
    reference = found.get("reference")
    if reference is not None:
        check(_published, reference, "reference.")
    return bool(found.get("deterministic", False))


def _top_level(
    run_dir: Annotated[str, Length(1)] | None = None,
    deterministic: bool = False,
    widths: Widths = (100, 100),
    reference: Mapping[str, str | int | float | None] | None = None,
) -> None:
    """Options that stand alone."""


def _published(
    strategy: str | None = None,
    acc: float | None = None,
    acc_std: float | None = None,
    bwt: float | None = None,
    bwt_std: float | None = None,
    forgetting: float | None = None,
    forgetting_std: float | None = None,
    seeds: Count | None = None,
    source: str | None = None,
) -> None:
    """Numbers that a run can be compared with, in percent."""


def _plain(cfg: DictConfig, resolve: bool = True) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(cfg, resolve=resolve)
    return {str(k): v for k, v in plain.items()}


def _checked(target: Callable[..., Any], cfg: DictConfig) -> dict[str, Any]:
    """The plain options of a node, as the target takes them.

    Raises:
        UsageError: an option is not one of the target's, or not what its annotation asks for.
    """
    require_arguments(target, cfg)
    prefix = f"{cfg._get_full_key(None)}."
    hints = annotations(target)
    options = {}
    for key, value in _plain(cfg).items():
        if key in HYDRAS or _has_target(value):
            continue
        kinds = [k for k in get_args(hints.get(key)) if inspect.isclass(k) and is_dataclass(k)]
        if value is None and kinds:
            fields = ", ".join(inspect.signature(kinds[0]).parameters)
            raise UsageError(f"{prefix}{key}=null: leave it out, or set its options ({fields})")
        options[key] = value
    return check(target, options, prefix, ranges_of(target))


def _has_target(value: Any) -> bool:
    """Whether Hydra makes an object of the value, or of something in it."""
    if isinstance(value, dict):
        return "_target_" in value or any(map(_has_target, value.values()))
    return isinstance(value, list) and any(map(_has_target, value))


def _on_cuda(trainer: DictConfig) -> bool:
    return trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def build(cfg: DictConfig, **given: Any) -> Any:
    """Make what ``_target_`` names from its configuration and from objects that are at hand.

    Args:
        cfg: a node with ``_target_``.
        given: objects; those that the target does not ask for are left out.

    Raises:
        UsageError: the target does not exist, or refuses its arguments.
    """
    with _explained(cfg):
        target = _target(cfg)
        options = _checked(target, cfg)
        accepted = inspect.signature(target).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        objects = {k: v for k, v in given.items() if takes_all or k in accepted}
        # Through _partial_, since Hydra would make a configuration of the objects.
        make = instantiate(cfg, _partial_=True, _convert_="all")
        made = make(**{**options, **objects})
        require_made(made, cfg)
        return made


def _target(cfg: DictConfig) -> Callable[..., Any]:
    """What ``_target_`` names, which is of the slot's kind."""
    target: Callable[..., Any] = get_object(cfg._target_)
    require_kind(target, cfg)
    return target


def require_arguments(target: Callable[..., Any], cfg: DictConfig) -> None:
    """Raise :class:`UsageError` if a key of ``cfg`` is none of the target's arguments."""
    accepted = inspect.signature(target).parameters
    if any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        return
    for key in cfg:
        if str(key) in accepted or str(key) in HYDRAS:
            continue
        name = cfg._get_full_key(str(key))
        group = name.rpartition(".")[0]
        close = difflib.get_close_matches(str(key), accepted, n=1)
        hint = f" Did you mean {group}.{close[0]}?" if close else ""
        raise UsageError(
            f"{name}={cfg[key]}: {target.__qualname__} has no such argument.{hint}\n"
            f"It takes: {', '.join(accepted)}"
        )


@contextmanager
def _explained(cfg: DictConfig) -> Iterator[None]:
    """Turn what a constructor raises into one message that names the target."""
    try:
        yield
    except (TypeError, ValueError, ImportError, HydraException) as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, UsageError):
                raise UsageError(_with_full_keys(str(cause), cfg)) from None
            cause = cause.__cause__
        given = {str(k): v for k, v in cfg.items() if not str(k).startswith("_") and v is not None}
        named = {k: v for k, v in given.items() if f"{v}" in str(error)} or given
        settings = ", ".join(f"{cfg._get_full_key(k)}={v}" for k, v in named.items())
        refusing = cfg.get("_target_", cfg._get_full_key(None))
        remedy = _defaults(cfg, named)
        raise UsageError(f"{settings}: {refusing} does not take that ({error}){remedy}") from error


def _defaults(cfg: DictConfig, keys: Iterable[str]) -> str:
    """What the target takes if nobody says anything, as a hint."""
    try:
        parameters = inspect.signature(get_object(cfg._target_)).parameters
    except (AttributeError, ValueError, ImportError, HydraException):
        return ""
    found = [parameters[k] for k in keys if k in parameters]
    known = [f"{p.name}={p.default}" for p in found if p.default is not p.empty]
    return f"; by default {', '.join(known)}" if known else ""


def _with_full_keys(message: str, cfg: DictConfig) -> str:
    """A constructor knows its arguments' names, not where they stand in the configuration."""
    node = cfg._get_full_key(None)
    if node.startswith("also."):  # a strategy calls its settings strategy.<key>
        message = message.replace("strategy.", f"{node}.")
    key = re.match(r"\w+(?=[.=])", message)
    return f"{node}.{message}" if key and key[0] in cfg and node else message


def _settings(kind: Callable[..., Settings], cfg: DictConfig) -> Settings:
    """Settings of ours from the node of their name."""
    with _explained(cfg):
        return kind(**_checked(kind, cfg))


SETTINGS = {
    "eval": EvalSettings,
    "alignment": AlignmentSettings,
    "checkpoint": CheckpointSettings,
    "search": SearchSettings,
    "probe": ProbeSettings,
}

PROBES = {
    "updates": UpdateSettings,
    "features": FeatureSettings,
    "recovery": RecoverySettings,
    "landscape": LandscapeSettings,
    "unprotected": UnprotectedSettings,
    "general_text": GeneralTextSettings,
}


def _probe(cfg: DictConfig | None) -> ProbeSettings | None:
    """Settings of the probes, each from its own node; None in runs older than them."""
    if cfg is None:
        return None
    with _explained(cfg):
        require_arguments(ProbeSettings, cfg)
        made: dict[str, Any] = {}
        for name, kind in PROBES.items():
            if name in cfg and not isinstance(cfg[name], DictConfig):
                raise UsageError(
                    f"probe.{name}={shown(cfg[name])}: probe.{name}.enabled=false leaves it out"
                )
            if name in cfg:
                made[name] = _settings(kind, cfg[name])
        return ProbeSettings(early=_plain(cfg)["early"], **made)


def _logger(cfg: DictConfig) -> dict[str, Any]:
    """Arguments of the W&B sink, tried once: nothing starts before it is told to."""
    with _explained(cfg):
        options = _checked(wandb_sink, cfg)
        wandb_sink(Path(), {}, **options)
    return options


def _strategy(cfg: DictConfig, name: str, given: Strategy | None) -> tuple[Strategy, str]:
    members = {name: build(cfg.strategy) if given is None else given}
    for companion, node in (cfg.get("also") or {}).items():
        if companion in members:
            raise UsageError(f"+also={companion}: the strategy is {name!r} already")
        members[str(companion)] = build(node)
    if len(members) == 1:
        return members[name], name
    return Together(members), "+".join(members)


def _optimizer(cfg: DictConfig) -> Any:
    """The factory, tried once on a parameter of its own: a negative rate shows before any work."""
    with _explained(cfg):
        _checked(_target(cfg), cfg)
        factory = instantiate(cfg, _partial_=True, _convert_="all")
        require_made(factory([{"params": [nn.Parameter()]}]), cfg)
    return factory


def _schedule(cfg: DictConfig) -> Plateau | Cosine | Callable[..., Any] | None:
    """What becomes of the rate within a task, tried once; None where the group is empty."""
    if "_target_" not in cfg:
        return None
    if not cfg.get("_partial_"):
        return build(cfg)  # type: ignore[no-any-return]
    with _explained(cfg):
        _checked(_target(cfg), cfg)
        factory = instantiate(cfg, _partial_=True, _convert_="all")
        require_made(factory(SGD([nn.Parameter()], lr=1.0)), cfg)
    return factory  # type: ignore[no-any-return]


def _trainer(cfg: DictConfig) -> Callable[..., Any]:
    """The factory, tried once: an accelerator that is not there shows before any work."""
    with _explained(cfg):

        def factory(**more: Any) -> Trainer:
            # Anew every time: a plugin or strategy that _target_ names serves one Trainer.
            make: Any = instantiate(cfg, _partial_=True, _convert_="all", **QUIET)
            return make(**more)  # type: ignore[no-any-return]

        try:
            with quiet_lightning():
                require_made(factory(), cfg)
        except MisconfigurationException as error:
            raise ValueError(str(error)) from None
    return factory
