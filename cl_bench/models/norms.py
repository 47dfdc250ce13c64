"""What batch normalisation normalises with in evaluation mode."""

from typing import Literal

from torch import nn

NormPolicy = Literal["batch_statistics", "running_statistics"]
"""``batch_statistics`` keeps no running statistics: evaluation normalises by its own batch, as the
papers' networks do, so a score depends on the batch it is computed in. ``running_statistics`` is
torch's usual layer: scores do not depend on the batch, and later tasks move the statistics unless
they are frozen (``protect.norm``)."""


def norm1d(policy: NormPolicy, features: int) -> nn.BatchNorm1d:
    """Batch normalisation of (n, features)."""
    return nn.BatchNorm1d(features, track_running_stats=_tracks(policy))


def norm2d(policy: NormPolicy, channels: int) -> nn.BatchNorm2d:
    """Batch normalisation of (n, channels, h, w)."""
    return nn.BatchNorm2d(channels, track_running_stats=_tracks(policy))


def _tracks(policy: NormPolicy) -> bool:
    return policy == "running_statistics"
