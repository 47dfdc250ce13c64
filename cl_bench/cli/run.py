"""One run from its configuration: here, in several processes, or in a federation's."""

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import SGD

from cl_bench.cli.build import on_cuda
from cl_bench.cli.effects import check_effects, of_steps
from cl_bench.cli.optimizers import remarks
from cl_bench.cli.prepare import Parts, Request, prepare
from cl_bench.cli.settings import check_top_level, require_nodes
from cl_bench.cli.threads import AUTO, check_threads, computing_with
from cl_bench.contracts import Engine, Stream, UsageError
from cl_bench.experiment import (
    Identity,
    LightningEngine,
    PerStep,
    Plateau,
    Result,
    check_sharded,
    check_together,
    conduct,
    new_directory,
    processes,
    search_facts,
    shares_weights,
    takes_no_steps,
)
from cl_bench.experiment.determinism import deterministically, statement
from cl_bench.experiment.reopen import Resume
from cl_bench.federation import FederatedEngine, Federation
from cl_bench.parallel.ranks import world
from cl_bench.streaming import StreamingEngine
from cl_bench.tracking.files import require_plain


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
    given = given or {}
    if isinstance(cfg.get("run_dir"), str):
        require_plain(Path(cfg.run_dir))
    require_nodes(cfg, given)
    notes = [*notes, *check_effects(cfg, words)]
    exact = check_top_level(cfg)
    asked = Request(cfg, command, choices, resume, given, words, notes, exact)
    with (
        computing_with(_threads(cfg, resume)),
        deterministically(exact),
        _company(processes(cfg.trainer), on_cuda(cfg.trainer)),
    ):
        parts = prepare(asked)
        plain = parts.federation is not None or parts.streaming is not None
        if words and not plain and takes_no_steps(parts.strategy, parts.stream):
            asked = replace(asked, notes=[*notes, *of_steps(cfg, words)])
        return _started(asked, parts)


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


def _started(asked: Request, parts: Parts) -> Result:
    """The run, where its configuration wants it."""
    cfg, federation = asked.cfg, parts.federation
    if federation is not None and federation.engine == "flower" and "site" not in asked.given:
        return _in_flower(asked, parts, federation)
    if shares_weights(cfg.trainer):
        settings, network = parts.settings, parts.learner.network
        check_sharded(parts.strategy, settings.probe, network, settings.alignment.enabled)
    if processes(cfg.trainer) > 1 and world() == 1:
        check_together(parts.learner)
        return _in_processes(asked, parts)
    return _here(asked, parts)


def _here(asked: Request, parts: Parts) -> Result:
    """The run in this process, or in this one of several."""
    cfg, stream, settings = asked.cfg, parts.stream, parts.settings
    says = statement(asked.deterministic, on_cuda(cfg.trainer))
    selected = OmegaConf.to_container(cfg.selected, resolve=True) if cfg.get("selected") else None
    at_task = parts.learner.at_task
    told = parts.strategy.needs.task_id_at_test and stream.scenario != "task"
    return conduct(
        stream,
        parts.strategy,
        parts.learner,
        parts.trainer,
        Identity(
            str(asked.choices.get("stream", stream.name)),
            parts.strategy_name,
            OmegaConf.to_yaml(cfg, resolve=True),
            asked.command,
            asked.choices,
        ),
        **settings.watched,
        checkpoint=settings.checkpoint,
        run_dir=cfg.run_dir,
        resume=asked.resume,
        sinks=parts.sinks,
        environment={
            "directory": os.getcwd(),
            "processes": processes(cfg.trainer),
            "effective_batch": settings.loop.batch_size * int(cfg.trainer.accumulate_grad_batches),
            "reproducible": says,
        },
        notes=[
            *asked.notes,
            *stream.remarks,
            *_idle_schedule(settings.loop.schedule, cfg.trainer.max_epochs, stream),
            *([says] if asked.deterministic else []),
            *remarks(parts.learner),
            *([f"{parts.strategy_name} is given the task id at test time"] if told else []),
        ],
        facts={
            **search_facts(stream, settings.search),
            **({"selection": selected} if selected else {}),
            **({"optimizer_at_task": at_task} if at_task != "reset" else {}),
        },
        engine=_engine(parts, cfg.trainer, asked.given),
        sharded=shares_weights(cfg.trainer),
    )


def _engine(
    parts: Parts,
    trainer: DictConfig,
    given: Mapping[str, Any],
) -> Callable[..., Engine]:
    device = "cuda" if on_cuda(trainer) else "cpu"
    if parts.streaming is not None:
        return functools.partial(StreamingEngine, streaming=parts.streaming, device=device)
    federation, strategy = parts.federation, parts.strategy
    if federation is None:
        return LightningEngine
    return functools.partial(
        FederatedEngine,
        federation=federation,
        device=device,
        site=given["site"](strategy) if "site" in given else None,
    )


def _in_flower(asked: Request, parts: Parts, federation: Federation) -> Result:
    try:
        from cl_bench.cli.flower import simulate, submit
        from cl_bench.federation.flower import as_json
    except ImportError as error:
        raise UsageError(
            f"federation.engine=flower needs the extra: pip install 'cl_bench[flower]' ({error})"
        ) from None
    cfg, command, choices, resume = asked.cfg, asked.command, asked.choices, asked.resume
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    nodes = federation.nodes or federation.population
    if federation.superlink is None:
        return simulate(
            lambda site: run_config(cfg, command, choices, resume, {**asked.given, "site": site}),
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
        parts.learner,
        parts.strategy,
    )


def _in_processes(asked: Request, parts: Parts) -> Result:
    from cl_bench.cli.together import start

    cfg, choices, given = asked.cfg, asked.choices, asked.given
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
    return start(
        cfg,
        asked.command,
        choices,
        asked.resume,
        run_dir,
        processes(cfg.trainer),
        parts.learner,
        parts.strategy,
        asked.notes,
    )


def _idle_schedule(
    schedule: Plateau | PerStep | Callable[..., Any] | None, max_epochs: int, stream: Stream
) -> list[str]:
    """A warning where no task has epochs enough for the schedule to change anything."""
    epochs = max(max_epochs if task.epochs is None else task.epochs for task in stream)
    if schedule is None or isinstance(schedule, PerStep):
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
