"""``plan=true``: the memory and disk that a run will take, planned before anything is loaded."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from cl_bench.cli.build import on_cuda
from cl_bench.cli.compose import composed
from cl_bench.cli.prepare import Parts, Request, prepare
from cl_bench.contracts import Memory, UsageError
from cl_bench.experiment import check_sharded, processes, shares_weights
from cl_bench.experiment.activations import estimate
from cl_bench.experiment.disk import Disk, disk
from cl_bench.experiment.memory import PHASES, Layout, MemoryPlan, plan_memory
from cl_bench.learners.guards import HALVING

GB = 1e9
HEADS = {
    "start": "start",
    "training": "training",
    "stepping": "step",
    "boundary": "task end",
    "evaluation": "scoring",
    "checkpoint": "saving",
}


def plan(arguments: Sequence[str]) -> None:
    """Print what the run that the other arguments describe will take.

    Args:
        arguments: the command line, ``plan=true`` among it, or ``plan=80``: gigabytes of a device
            that is not here.

    Raises:
        UsageError: the run could not start, or ``plan`` is neither.
    """
    words = [a for a in arguments if a.partition("=")[0] != "plan"]
    device_gb = _device(next(a for a in arguments if a.partition("=")[0] == "plan"))
    cfg, choices = composed(words)
    for group, example in (("strategy", "gpm"), ("stream", "permuted_digits")):
        if group not in cfg:
            raise UsageError(f"plan: no {group} is named; add one, +{group}={example}")
    console = Console()
    for line in lines(cfg, choices, device_gb):
        console.print(line)


def lines(
    cfg: DictConfig, choices: dict[str, str], device_gb: float | None = None
) -> list[str | Table]:
    """The plan, as it is printed."""
    made, room = planned(cfg, choices, device_gb is not None)
    return [
        *_table(made),
        *_fits(made, room, device_gb),
        *(f"not planned: {what}" for what in made.unknown),
    ]


def planned(
    cfg: DictConfig, choices: dict[str, str], elsewhere: bool = False
) -> tuple[MemoryPlan, Disk]:
    """What a run of this configuration holds, and the disk that it takes.

    Args:
        cfg: the composed configuration.
        choices: which option of each group was chosen.
        elsewhere: whether it is meant for devices with a memory of their own, which are not here.

    Raises:
        UsageError: the run could not start, or has no Trainer.
    """
    for group in ("federation", "engine"):
        if group in cfg:
            raise UsageError(f"+{group}=...: a plan is of runs with a Trainer; leave it out")
    deterministic = bool(cfg.get("deterministic"))
    parts = prepare(Request(cfg, "plan", choices, False, {}, (), (), deterministic), planned=True)
    if shares_weights(cfg.trainer):
        settings = parts.settings
        watched = settings.alignment.enabled
        check_sharded(parts.strategy, settings.probe, parts.learner.network, watched)
    count, precision = processes(cfg.trainer), str(cfg.trainer.get("precision", "32-true"))
    rounding = parts.learner.rounding
    if rounding is not None:  # what is kept for the backward pass is what autocast would keep
        rounding.detach()
        precision = "bf16-mixed" if rounding.dtype == torch.bfloat16 else "16-mixed"
    elif precision in HALVING:
        parts.learner.network.to(HALVING[precision])
    layout = Layout(
        processes=count,
        here=count // int(cfg.trainer.get("num_nodes", 1)),
        sharded=shares_weights(cfg.trainer),
        on_device=elsewhere or on_cuda(cfg.trainer),
        casts=precision.endswith("mixed"),
    )
    return _added_up(cfg, parts, layout, precision)


def _added_up(
    cfg: DictConfig, parts: Parts, layout: Layout, precision: str
) -> tuple[MemoryPlan, Disk]:
    learner, strategy, settings = parts.learner, parts.strategy, parts.settings
    tasks = len(parts.stream)
    own = strategy.footprint(learner, tasks, layout.parts) or Memory()
    activations = estimate(
        learner,
        learner.example(),
        -(-settings.loop.batch_size // layout.processes),
        -(-settings.evaluation.batch_size // layout.processes),
        own.frozen,
        precision,
    )
    made = plan_memory(
        learner,
        strategy,
        layout,
        activations,
        settings.checkpoint,
        tasks,
        watched=settings.alignment.enabled,
    )
    where = Path(cfg.run_dir) if cfg.run_dir else Path("runs")
    room = disk(learner, learner._optimizer_factory, settings.checkpoint, tasks, where)
    return made, room


def _device(word: str) -> float | None:
    value = word.partition("=")[2]
    if value == "true":
        return None
    try:
        found = float(value)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise UsageError(
            f"{word}: use plan=true, or plan=80 for devices of 80 GB that are not here"
        )
    return found


def _table(made: MemoryPlan) -> list[str | Table]:
    count, how = made.layout.processes, "share the weights out" if made.layout.sharded else "alike"
    who = "one process" if count == 1 else f"each of {count} processes, which {how}"
    if count > 1 and not made.layout.sharded:
        who = f"each of {count} processes, a copy of the weights in each"
    title = f"planned, not measured: GB of {who}"
    table = Table(
        title=title, title_justify="left", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("")
    for phase in PHASES:
        table.add_column(HEADS[phase], justify="right", no_wrap=True)
    for what, row in made.device.items():
        table.add_row(what, *(_gb(row.get(phase, 0)) for phase in PHASES))
    table.add_section()
    table.add_row("all", *(_gb(made.total(phase)) for phase in PHASES))
    return [table]


def _fits(made: MemoryPlan, room: Disk, device_gb: float | None) -> list[str]:
    found = []
    if made.layout.on_device:
        there = device_gb * GB if device_gb else torch.cuda.get_device_properties(0).total_memory
        found.append(_against("a device", made.peak, int(there)))
    if made.layout.on_device:
        what = "; ".join(f"{k} {_gb(v)}" for k, v in made.host.items() if v) or "nothing more"
    else:
        parts = {f"{made.layout.here} x the above": made.layout.here * made.peak, **made.host}
        what = "; ".join(f"{k} {_gb(v)}" for k, v in parts.items() if v)
    here = None if device_gb else _host_memory()
    found.append(_against("the host", made.host_total, here) + f" ({what})")
    disk_there = None if device_gb else room.free
    found.append(
        _against("the disk", room.total, disk_there)
        + f" (weights {_gb(room.weights)}; checkpoints {_gb(room.checkpoints)})"
    )
    return found


def _against(what: str, wanted: int, there: int | None) -> str:
    said = f"{what}: {_gb(wanted)} GB planned"
    if there is None:
        return said
    fits = "fits" if wanted <= there else "does not fit"
    return f"{said} of {_gb(there)} GB: {fits}"


def _host_memory() -> int:
    """Of this machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gb(size: int) -> str:
    return f"{size / GB:.3g}" if size else ""
