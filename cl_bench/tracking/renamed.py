"""What records of earlier versions call classes and settings, and what these are called now."""

from typing import Any

from cl_bench.contracts import UsageError

STREAMS = (
    "biography.Biography",
    "biography.stream.Biography",
    "cifar100_superclass.CIFAR100Superclass",
    "five_datasets.FiveDatasets",
    "permuted_digits.PermutedDigits",
    "pmnist.PMNIST",
    "rotated_digits.RotatedDigits",
    "rotated_mnist.RotatedMNIST",
    "split_cifar100.SplitCIFAR100",
    "split_digits.SplitDigits",
    "split_images.SplitImages",
    "split_mini_imagenet.SplitMiniImageNet",
    "split_mnist.SplitMNIST",
    "t5_cl.T5CL",
    "t5_cl_fewshot.FewShot",
    "t5_cl_hub.HubText",
    "t5_cl_small.SmallText",
    "text.Prompt",
    "text.stream.TextStream",
    "trace.Trace",
)

STRATEGIES = {
    "adam_nscl.AdamNSCL": "projection",
    "adaptive_svd.AdaptiveSVD": "svd",
    "er.ER": "replay",
    "ewc.EWC": "penalty",
    "fedavg.FedAvg": "federated",
    "fedprox.FedProx": "federated",
    "finetune.Finetune": "baselines",
    "fot.FOT": "federated",
    "freeze.Freeze": "isolation",
    "gpm.GPM": "projection",
    "inc_lora.IncLoRA": "lowrank",
    "joint.Joint": "baselines",
    "o_lora.OLoRA": "lowrank",
    "rogo.ROGO": "projection",
    "seq_lora.SeqLoRA": "lowrank",
    "sgp.SGP": "projection",
    "task_vector.TaskVector": "merging",
    "trgp.TRGP": "projection",
}

RENAMED = {f"tasks.{name}": f"cl_bench.tasks.{name}" for name in STREAMS} | {
    f"cl_bench.strategies.{name}": f"cl_bench.strategies.{family}.{name}"
    for name, family in STRATEGIES.items()
}
"""Each name in full: another module of that package's name is somebody's own."""


PROBES = {
    "updates": "updates.UpdateSettings",
    "features": "features.FeatureSettings",
    "recovery": "recovery.RecoverySettings",
    "landscape": "landscape.LandscapeSettings",
    "unprotected": "unprotected.UnprotectedSettings",
    "general_text": "general_text.GeneralTextSettings",
}
"""Those that were known by name, before each named its class."""

NAMING = ("_target_", "object")
"""Keys whose value names a class: one to make, or that of an object which Python code gave."""


def renamed(node: Any, key: str = "") -> Any:
    """A plain configuration with the present names of classes that have moved."""
    if isinstance(node, dict):
        return {k: renamed(inner, str(k)) for k, inner in node.items()}
    if isinstance(node, list):
        return [renamed(inner) for inner in node]
    return RENAMED.get(node, node) if key in NAMING and isinstance(node, str) else node


def present(config: dict[str, Any]) -> dict[str, Any]:
    """A plain configuration of any version, with the names and settings of this one."""
    found: dict[str, Any] = renamed(config)
    if "federation" not in found:  # elsewhere model.hidden alone tells them
        found.pop("widths", None)
    optimizer = found.get("optimizer")
    if isinstance(optimizer, dict) and "_target_" in optimizer:
        optimizer.setdefault("at_task", "reset")  # what all did
    probes = found.get("probe")
    for name, node in probes.items() if isinstance(probes, dict) else ():
        if name in PROBES and isinstance(node, dict) and "_target_" not in node:
            node["_target_"] = f"cl_bench.experiment.probes.{PROBES[name]}"
    return found


def without_idle(config: dict[str, Any]) -> dict[str, Any]:
    """A plain configuration without probes that are off: what they would do is no difference."""
    probes = config.get("probe")
    if not isinstance(probes, dict):
        return config
    on = {k: v for k, v in probes.items() if not isinstance(v, dict) or v.get("enabled", True)}
    return {**config, "probe": on}


def require_present_names(node: Any, where: str = "") -> None:
    """Raise :class:`UsageError` if a new run would record a class by what was once another's name.

    Args:
        node: a plain configuration.
        where: its key.
    """
    if isinstance(node, list | dict):
        for key, inner in node.items() if isinstance(node, dict) else enumerate(node):
            require_present_names(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(node, str) and where.endswith("_target_") and node in RENAMED:
        raise UsageError(
            f"{where}={node}: earlier versions gave this name to {RENAMED[node]}; write that, or "
            "call a module of your own otherwise"
        )
