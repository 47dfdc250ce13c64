"""What a Trainer cannot do together with a strategy, a stream or probes."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from cl_bench.contracts import Strategy, UsageError
from cl_bench.contracts.options import shown
from cl_bench.contracts.strategy import overrides
from cl_bench.experiment.probes.settings import ProbeSettings
from cl_bench.learners.batch_norm import by_batch
from cl_bench.packed import check_packs

WHOLE = 1 << 29
"""Most weights of a network that is put together in every process, where they share weights out."""


def processes(trainer: Mapping[str, Any]) -> int:
    """How many processes train together: devices on a node, times nodes.

    Raises:
        UsageError: the options do not say so.
    """
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    if devices in ("1", [0]):
        devices = 1
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (devices, nodes))
    if not whole or min(devices, nodes) < 1:
        raise UsageError(
            f"trainer.devices={shown(devices)}, trainer.num_nodes={shown(nodes)}: whole numbers of "
            "at least 1 (which GPUs, says the environment variable CUDA_VISIBLE_DEVICES)"
        )
    return int(devices * nodes)


def shares_weights(trainer: Mapping[str, Any]) -> bool:
    """Whether the Trainer's options have processes share the weights out (FSDP2)."""
    strategy = trainer.get("strategy", "auto")
    target = str(strategy.get("_target_")) if isinstance(strategy, Mapping) else ""
    return target.rpartition(".")[2] == "ModelParallelStrategy"


def check_together(network: nn.Module) -> None:
    """Raise :class:`UsageError` if several processes cannot train this network together."""
    for name in by_batch(network):
        raise UsageError(
            f"layer {name!r} normalises test data by the batch it stands in, and every process "
            "tests on a part: use model.norm=running_statistics, or trainer=default"
        )


def check_sharded(
    strategy: Strategy,
    probe: ProbeSettings | None,
    network: nn.Module | None = None,
    watched: bool = False,
) -> None:
    """Raise :class:`UsageError` if weights cannot be shared out among processes (FSDP2).

    Args:
        strategy: which may need whole weights.
        probe: what is measured.
        network: whose weights they are, as many as it has; None is a small one.
        watched: whether alignment is.
    """
    total = 0 if network is None else sum(p.numel() for p in network.parameters())
    if total > WHOLE:
        _refuse_whole(strategy, probe, total, watched)
    for member in strategy.members:
        if not member.needs.shardable:
            raise UsageError(
                f"trainer=fsdp leaves in every process some rows of each weight, and the strategy "
                f"({type(member).__name__}, with these options) needs whole ones: use trainer=ddp; "
                "docs/several_gpus.md says what can be shared out"
            )
        for hook, what in (("modules", "modules of its own"), ("phases", "phases")):
            if overrides(member, hook):
                raise UsageError(
                    f"trainer=fsdp shares out the weights of the network once, and the strategy "
                    f"({type(member).__name__}) has {what}: use trainer=ddp"
                )
    for name, watching in (probe.members if probe else {}).items():
        if watching.enabled and watching.writes:
            raise UsageError(
                f"probe.{name} writes to the network on the side, whose weights trainer=fsdp "
                "shares out: use trainer=ddp, or leave the probe out"
            )


def _refuse_whole(
    strategy: Strategy, probe: ProbeSettings | None, total: int, watched: bool
) -> None:
    """What would have every process hold all weights of a large network."""
    probes = probe.members.items() if probe else ()
    said = {f"probe.{name}.enabled=false": on.enabled for name, on in probes}
    said["alignment.enabled=false"] = watched
    remedies = [remedy for remedy, on in said.items() if on]
    members = [type(m).__name__ for m in strategy.members if m.needs.gathers]
    if remedies or members:
        what = "; ".join(
            [f"add {' '.join(remedies)}"] * bool(remedies)
            + [f"use {' and '.join(members)} with other options or not at all"] * bool(members)
        )
        raise UsageError(
            f"trainer=fsdp: with these options every process would hold all {total:,} weights, "
            f"which it does up to {WHOLE:,}: {what} (training, evaluation, second moments and "
            "checkpoints put a block together at a time)"
        )


def check_trainer(trainer: Mapping[str, Any], pack: int, strategy: Strategy) -> None:
    """Raise :class:`UsageError` if the Trainer's options do not fit the loop or the strategy.

    Args:
        trainer: the Trainer's arguments.
        pack: batches per training step.
        strategy: whose gradients clipping by value would bend.
    """
    count, sharded = processes(trainer), shares_weights(trainer)
    if count > 1 and not sharded and str(trainer.get("strategy", "auto")) != "ddp":
        raise UsageError(
            f"trainer.devices={trainer.get('devices')}, trainer.num_nodes="
            f"{trainer.get('num_nodes', 1)}: {count} processes train together with trainer=ddp "
            "or, sharing out the weights, trainer=fsdp; add one"
        )
    if count == 1 and sharded:
        raise UsageError(
            "trainer.devices=1: one process has nobody to share weights out with; use "
            "trainer=default, or more trainer.devices"
        )
    check_packs(trainer, pack, count)
    if trainer.get("max_epochs", 1) is None:
        raise UsageError("trainer.max_epochs=null: say how many, at least 1")
    if trainer.get("gradient_clip_algorithm") == "value" and strategy.needs.rewrites_gradients:
        raise UsageError(
            "trainer.gradient_clip_algorithm=value leads a projected gradient out of its subspace: "
            "use trainer.gradient_clip_algorithm=norm"
        )


def check_plain_loop(trainer: Mapping[str, Any], who: str) -> None:
    """Raise :class:`UsageError` where ``who`` learn in a plain loop, and options need a Trainer."""
    for key, plain in (
        ("gradient_clip_val", (None, 0, 0.0)),
        ("accumulate_grad_batches", (1,)),
        ("limit_train_batches", (None,)),
        ("deterministic", (None, False)),
        ("devices", (1, "1", [0])),
        ("num_nodes", (1,)),
    ):
        if trainer.get(key, plain[0]) not in plain:
            raise UsageError(
                f"trainer.{key}={trainer[key]}: {who} in a plain loop, without a Trainer, "
                "that does not do this; leave it out"
            )
    if str(trainer.get("precision", "32-true")) not in ("32", "32-true"):
        raise UsageError(
            f"trainer.precision={trainer['precision']}: {who} in single precision; use "
            "trainer.precision=32-true"
        )
