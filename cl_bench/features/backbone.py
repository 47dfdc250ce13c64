"""A frozen network with what makes inputs of stored samples."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cl_bench.contracts import Origin, Samples, Stored, UsageError
from cl_bench.contracts.options import Count, OnlyWith
from cl_bench.data import digest
from cl_bench.features.base import BaseTraining, train_on_base
from cl_bench.learners.batch_norm import by_batch
from cl_bench.tasks.text.tokens import load_tokens

FORMAT = 1
"""Counts up whenever the same settings lead to other features."""

Interpolation = Literal["nearest-exact", "bilinear", "bicubic"]


class Backbone(ABC):
    """What makes features (n, d) of samples, each on its own, and never learns.

    Args:
        network: inputs to features (n, ...); put into evaluation mode.
        batch_size: samples that go through it at a time.
        device: ``auto`` takes a GPU where there is one.
        base: how it learns the stream's first task before it is frozen; None: it stays as it is.

    Raises:
        UsageError: what the network says of a sample depends on the batch it stands in.
    """

    kind: Literal["image", "text"]

    def __init__(
        self, network: nn.Module, batch_size: Count, device: str, base: BaseTraining | None
    ) -> None:
        for name in by_batch(network):
            raise UsageError(
                f"backbone.network: layer {name!r} normalises by the batch, so that a sample has "
                "no features of its own; use one with running statistics"
            )
        self.device = _device(device)
        self.batch_size = batch_size
        self.base = base
        self.network = network.eval().requires_grad_(False)

    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """How inputs are made of samples: everything that the features depend on."""

    @abstractmethod
    def inputs(self, samples: Any) -> Tensor:
        """What the network takes, of samples as :class:`~cl_bench.contracts.Samples` gives them."""

    def prepare(self, first: Stored, say: Callable[[str], None]) -> None:
        """Learn the stream's first task, where :attr:`base` says so. To be called once, before all.

        Args:
            first: its training data.
            say: is told what takes long.
        """
        if self.base is None:
            return

        def inputs(rows: Tensor) -> Tensor:
            return self.inputs(first.samples[rows])

        name = f"{self.layer} {json.dumps(dict(self.settings()))}"
        self.network.requires_grad_(True)
        train_on_base(self.network, first, inputs, self.base, name, say)
        self.network.eval().requires_grad_(False)

    @cached_property
    def weights(self) -> str:
        """Sha256 of the network's weights and statistics."""
        return digest({k: v.cpu() for k, v in self.network.state_dict().items()})

    @cached_property
    def identity(self) -> str:
        """Sha256 of weights, network and preprocessing: whatever the features depend on."""
        parts = [FORMAT, self.kind, self.layer, self.weights, dict(self.settings())]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def layer(self) -> str:
        """The network, and which of its values the features are."""
        kind = type(self.network)
        pooling = getattr(self.network, "pooling", "output")
        return f"{kind.__module__}.{kind.__qualname__}: {pooling}"

    def facts(self) -> dict[str, Any]:
        """Plain values for the record."""
        origin: Origin | None = getattr(self.network, "origin", None)
        return {
            "layer": self.layer,
            "weights_sha256": self.weights,
            "preprocessing": dict(self.settings()),
            "source": origin.source if origin else "unknown",
            "licence": origin.licence if origin else "unknown",
            "citation": origin.citation if origin else "unknown",
            **({"base": asdict(self.base)} if self.base else {}),
            "trained_on": "the stream's first task"
            if self.base
            else getattr(self.network, "trained_on", None) or "unknown",
        }

    @torch.no_grad()
    def features(self, samples: Samples, rows: Tensor) -> Tensor:
        """float32 (len(rows), d) of the samples at ``rows``, on the CPU.

        Raises:
            UsageError: the network does not take them, or says something that is not finite.
        """
        network = self.network.to(self.device)
        found = []
        for part in torch.split(rows, self.batch_size):
            x = self.inputs(samples[part]).to(self.device)
            try:
                out = network(x).flatten(1).float().cpu()
            except (RuntimeError, ValueError, IndexError) as error:
                raise UsageError(
                    f"backbone.network: {self.layer} does not take inputs of shape "
                    f"{tuple(x.shape)} ({error})"
                ) from error
            found.append(out)
        features = torch.cat(found)
        if not bool(features.isfinite().all()):
            raise UsageError(f"backbone.network: {self.layer} gives features that are not finite")
        return features


class ImageBackbone(Backbone):
    """Images, resized and normalised as the network has learned them; torch alone.

    Args:
        network: images (n, 3, h, w) to features.
        side: height and width that images are brought to, aspect ratio not kept; None keeps theirs.
        interpolation: how; ``bilinear`` and ``bicubic`` as Pillow does, with an antialiasing filter
            where an image shrinks.
        mean: per channel, pixels counted from 0 to 1.
        std: the same.
        batch_size: images that go through the network at a time.
        device: ``auto`` takes a GPU where there is one.
        base: how the network learns the stream's first task before it is frozen; None: not at all.
    """

    kind = "image"

    def __init__(
        self,
        network: nn.Module,
        side: Count | None = 224,
        interpolation: Annotated[Interpolation, OnlyWith("side")] = "bilinear",
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        batch_size: Count = 64,
        device: str = "auto",
        base: BaseTraining | None = None,
    ) -> None:
        super().__init__(network, batch_size, device, base)
        if not len(mean) == len(std) > 0 or min(std) <= 0:
            raise UsageError(
                f"backbone.mean={list(mean)}, backbone.std={list(std)}: one number a channel in "
                "both, deviations above 0"
            )
        self.side = side
        self.interpolation = interpolation
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        # Depthwise convolutions are a third quicker like this on a CPU.
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def settings(self) -> Mapping[str, Any]:
        """Size, interpolation, normalisation."""
        resized = {"side": self.side, "interpolation": self.interpolation} if self.side else {}
        return {**resized, "mean": self.mean, "std": self.std}

    def inputs(self, samples: Tensor) -> Tensor:
        """float32 (n, channels, side, side) of images (n, c, h, w) in [0, 1]."""
        x = samples
        if x.shape[1] not in (1, len(self.mean)):
            raise UsageError(
                f"backbone.mean={list(self.mean)}: images of {x.shape[1]} channels do not go with "
                f"{len(self.mean)} of the backbone; use another backbone"
            )
        x = x.expand(-1, len(self.mean), -1, -1)
        if self.side is not None and x.shape[2:] != (self.side, self.side):
            smooth = self.interpolation != "nearest-exact"
            x = F.interpolate(
                x,
                (self.side, self.side),
                mode=self.interpolation,
                align_corners=False if smooth else None,
                antialias=smooth,  # where an image grows: Pillow's kernel, which torch's is not
            ).clamp(0, 1)
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


class TextBackbone(Backbone):
    """Texts, tokenised as the network has learned them.

    Args:
        network: token ids int64 (n, L), padded with 0 or ``network.pad``, to features.
        tokenizer: ``bytes``, a folder or a hub id; None for the one that the network brings.
        length: most tokens of a text, special ones included; what is longer loses its end.
        batch_size: texts that go through the network at a time.
        device: ``auto`` takes a GPU where there is one.
        base: how the network learns the stream's first task before it is frozen; None: not at all.

    Raises:
        UsageError: there is no such tokenizer.
    """

    kind = "text"

    def __init__(
        self,
        network: nn.Module,
        tokenizer: str | None = None,
        length: Count = 128,
        batch_size: Count = 64,
        device: str = "auto",
        base: BaseTraining | None = None,
    ) -> None:
        super().__init__(network, batch_size, device, base)
        name = tokenizer or getattr(network, "tokenizer", None)
        if name is None:
            raise UsageError("backbone.tokenizer=null: the network brings none; name one")
        self.length = length
        self.tokens = load_tokens(str(name), "backbone.tokenizer")

    def settings(self) -> Mapping[str, Any]:
        """Tokenizer, by what it does, and length."""
        return {"tokenizer": self.tokens.identity, "length": self.length}

    def inputs(self, samples: Sequence[str]) -> Tensor:
        """int64 (n, L), L the longest of these texts' lengths."""
        ids = self.tokens(samples, self.length)
        longest = int((ids != self.tokens.pad).sum(1).max().clamp(min=1))
        return ids[:, :longest]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"backbone.device={name}: not here ({reason}); use auto or cpu") from None
    return device
