"""The same strategies inside other people's loops: plain PyTorch, somebody's LightningModule."""

from cl_bench.integrations.lightning import ContinualCallback
from cl_bench.integrations.pytorch import Guarded

__all__ = ["ContinualCallback", "Guarded"]
