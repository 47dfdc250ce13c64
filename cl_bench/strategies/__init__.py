"""Update rules, a family a folder, one file a method: ``from cl_bench.strategies import GPM``.

A method is imported when somebody asks for it: none pulls in another's packages.
"""

from importlib import import_module
from typing import Any

MODULES = {
    "AdamNSCL": "projection.adam_nscl",
    "AdaptiveSVD": "svd.adaptive_svd",
    "ER": "replay.er",
    "EWC": "penalty.ewc",
    "FOT": "federated.fot",
    "FedAvg": "federated.fedavg",
    "FedProx": "federated.fedprox",
    "Finetune": "baselines.finetune",
    "Freeze": "isolation.freeze",
    "GPM": "projection.gpm",
    "IncLoRA": "lowrank.inc_lora",
    "Joint": "baselines.joint",
    "OLoRA": "lowrank.o_lora",
    "ROGO": "projection.rogo",
    "SGP": "projection.sgp",
    "SeqLoRA": "lowrank.seq_lora",
    "TRGP": "projection.trgp",
    "TaskVector": "merging.task_vector",
}
"""Where in this package each class is."""


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULES})
