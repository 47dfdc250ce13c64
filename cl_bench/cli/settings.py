"""Settings of a run, which are made of plain values, from its configuration."""

import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from cl_bench.cli.build import build_schedule
from cl_bench.cli.objects import build, checked_options, explained, plain, target_of
from cl_bench.contracts import UsageError
from cl_bench.contracts.checking import check
from cl_bench.contracts.options import Count, Length, Widths, known, shown
from cl_bench.experiment import (
    AlignmentSettings,
    CheckpointSettings,
    EvalSettings,
    LoopSettings,
    ProbeSettings,
    SearchSettings,
)
from cl_bench.experiment.identity import SinkFactory
from cl_bench.experiment.probes import Probe
from cl_bench.metrics import summaries
from cl_bench.tracking import wandb_sink
from cl_bench.tracking.lightning import LightningSink
from cl_bench.tracking.renamed import require_present_names

Settings = TypeVar("Settings")

NODES = (
    "eval", "alignment", "checkpoint", "strategy", "stream", "model", "optimizer", "schedule",
    "learner", "trainer", "logger",
)  # fmt: skip
"""Parts of a configuration that every run has."""

NEEDED = {"tensorboard": "tensorboard", "tensorboardX": "tensorboard", "mlflow": "mlflow"}
"""Packages by the logger that needs one of them."""

MADE = ("strategy", "stream", "model", "optimizer", "learner", "trainer")
"""Those of them that name what they are made into."""

SETTINGS = {
    "eval": EvalSettings,
    "alignment": AlignmentSettings,
    "checkpoint": CheckpointSettings,
    "search": SearchSettings,
    "probe": ProbeSettings,
}


@dataclass(frozen=True)
class RunSettings:
    """All of them.

    Attributes:
        loop: seed, batches, schedule.
        evaluation: how much is evaluated.
        alignment: how updates are watched.
        probe: what else is measured on the way; None in runs older than probes.
        checkpoint: when checkpoints are written.
        search: whether the run is a trial of one.
    """

    loop: LoopSettings
    evaluation: EvalSettings
    alignment: AlignmentSettings
    probe: ProbeSettings | None
    checkpoint: CheckpointSettings
    search: SearchSettings

    @property
    def watched(self) -> dict[str, Any]:
        """Those that say what watches the run."""
        return {
            "alignment": self.alignment,
            "probe": self.probe,
            "evaluation": self.evaluation,
            "loop": self.loop,
        }


def read_settings(cfg: DictConfig) -> RunSettings:
    """The settings of a run.

    Raises:
        UsageError: one of them is not what it must be.
    """
    evaluation = settings_of(EvalSettings, cfg.eval)
    loop = LoopSettings(
        cfg.seed,
        cfg.batch_size,
        cfg.pack,
        cfg.num_workers,
        schedule=build_schedule(cfg.schedule),
        validation_batch_size=evaluation.batch_size,
        batch_tokens=cfg.get("batch_tokens"),  # older runs have none of these
        log_steps=cfg.get("log_steps"),
    )
    return RunSettings(
        loop,
        evaluation,
        settings_of(AlignmentSettings, cfg.alignment),
        probe_settings(cfg.get("probe")),
        settings_of(CheckpointSettings, cfg.checkpoint),
        settings_of(SearchSettings, cfg.search) if cfg.get("search") else SearchSettings(),
    )


def require_nodes(cfg: DictConfig, given: Mapping[str, Any]) -> None:
    """Raise :class:`UsageError` if a part of the configuration is missing, empty or misnamed."""
    require_present_names(plain(cfg, resolve=False))
    for name in (*NODES, *({"probe", "search"} & set(cfg))):  # older runs have none of these
        node = cfg.get(name)
        made = name in MADE and name not in given
        if not isinstance(node, DictConfig) or (made and "_target_" not in node):
            remedy = f"leave {name}=... or ~{name} out"
            if node is None or isinstance(node, DictConfig):
                raise UsageError(f"{name} is missing: a run needs it; {remedy}")
            raise UsageError(
                f"{name}={shown(node)}: its options stand below it, {name}.<option>=...; {remedy}"
            )
        target = node.get("_target_", name)
        if not (isinstance(target, str) and target):
            raise UsageError(f"{name}._target_={shown(target)}: name a class or a function")
    if "_target_" in (cfg.get("probe") or ()):
        raise UsageError(
            "probe=...: every probe is there already; switch one on, probe.<name>.enabled=true"
        )
    added = {f"also.{n}": (node, f"+also={n}") for n, node in (cfg.get("also") or {}).items()}
    if "federation" in cfg:
        added["federation"] = (cfg.federation, "+federation=small")
    if "engine" in cfg:
        added["engine"] = (cfg.engine, "+engine=streaming")
    if "backbone" in cfg:
        added["backbone"] = (cfg.backbone, "+backbone=efficientnet_lite0")
    if cfg.get("adapter") is not None:
        added["adapter"] = (cfg.adapter, "adapter=lora")
    for name, (node, word) in added.items():
        if not isinstance(node, DictConfig) or "_target_" not in node:
            raise UsageError(f"{name} has settings, but is not named: add {word}")


def check_top_level(cfg: DictConfig) -> bool:
    """Check what concerns the run as a whole; returns whether it is deterministic."""
    top = {k: v for k, v in plain(cfg, resolve=False).items() if not isinstance(v, str)}
    found = {
        k: top.get(k, cfg.get(k)) for k in inspect.signature(_top_level).parameters if k in cfg
    }
    reference = found.get("reference")
    if reference is not None and isinstance(cfg.reference, DictConfig):
        reference = found["reference"] = plain(cfg.reference)  # its numbers may refer to others
    check(_top_level, found)
    if reference is not None:
        numbers = [field.name for field in fields(PUBLISHED)]
        for key in set(reference) - set(numbers):
            raise UsageError(
                f"reference.{key}={shown(reference[key])}: no such number is compared; there are "
                f"{', '.join(numbers)}"
            )
        check(PUBLISHED, reference, "reference.")
    return bool(found.get("deterministic", False))


def _top_level(
    run_dir: Annotated[str, Length(1)] | None = None,
    deterministic: bool = False,
    widths: Widths = (100, 100),
    reference: Mapping[str, str | int | float | None] | None = None,
) -> None:
    """Options that stand alone."""


PUBLISHED = make_dataclass(
    "PUBLISHED",
    [
        ("strategy", str | None, None),
        *((f"{key}{kind}", float | None, None) for key in summaries() for kind in ("", "_std")),
        ("seeds", Count | None, None),
        ("source", str | None, None),
    ],
)
"""Numbers that a run can be compared with, in percent: each summary, and its standard deviation."""


def settings_of(kind: Callable[..., Settings], cfg: DictConfig) -> Settings:
    """Settings of ours from the node of their name."""
    with explained(cfg):
        return kind(**checked_options(kind, cfg))


def probe_settings(cfg: DictConfig | None) -> ProbeSettings | None:
    """Settings of the probes, each from its own node; None in runs older than them."""
    if cfg is None:
        return None
    with explained(cfg):
        names = [str(name) for name in cfg if name != "early"]
        members: dict[str, Any] = {name: _probe(cfg, name) for name in names}
        early = {"early": plain(cfg)["early"]} if "early" in cfg else {}
        return ProbeSettings(**early, **members)


def _probe(cfg: DictConfig, name: str) -> Probe:
    node = cfg[name]
    if not isinstance(node, DictConfig):
        raise UsageError(f"probe.{name}={shown(node)}: probe.{name}.enabled=false leaves it out")
    if "_target_" not in node:
        there = [str(k) for k, v in cfg.items() if isinstance(v, DictConfig) and "_target_" in v]
        raise UsageError(
            f"probe.{name}: there is no such probe.{known(name, there, 'probe.')}\nThere are: "
            f"{', '.join(there)}"
        )
    made: Probe = build(node)
    return made


def sink_factories(cfg: DictConfig, config: Mapping[str, Any]) -> list[SinkFactory]:
    """What makes the loggers of a run, tried once: nothing starts before it is told to.

    W&B is there where its options stand in ``logger``; others stand in ``logger.also`` by name.

    Args:
        cfg: the node ``logger``.
        config: the resolved configuration.
    """
    own = {k: v for k, v in plain(cfg).items() if k != "also"}
    found: list[SinkFactory] = []
    if own:
        node = OmegaConf.create({"logger": own}).logger
        with explained(node):
            options = checked_options(wandb_sink, node)
            wandb_sink(Path(), {}, **options)
        found.append(functools.partial(wandb_sink, config=config, **options))
    for name, node in (cfg.get("also") or {}).items():
        if not isinstance(node, DictConfig) or "_target_" not in node:
            raise UsageError(f"logger.also.{name}: name one of Lightning's loggers, _target_: ...")
        found.append(_lightning_sink(str(name), node, config))
    return found


def _lightning_sink(name: str, node: DictConfig, config: Mapping[str, Any]) -> SinkFactory:
    """What makes one of Lightning's loggers; without a place of its own, in the run's directory."""
    with explained(node):
        target: Any = target_of(node)
        options = checked_options(target, node)
        accepted = inspect.signature(target).parameters
        required = [requirement for requirement, there in NEEDED.items() if there == name]
        missing = [r for r in required if importlib.util.find_spec(r) is None]
        if missing and len(missing) == len(required):
            raise UsageError(
                f"logger={name}: needs a package that is not installed: pip install {missing[0]}"
            )

    def make(directory: Path | str) -> LightningSink:
        place = {"save_dir": str(directory)} if options.get("save_dir") is None else {}
        own = {**options, **(place if "save_dir" in accepted else {})}
        return LightningSink(name, Path(directory), functools.partial(target, **own), config)

    return make
