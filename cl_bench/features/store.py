"""Features of all stored samples of one side, kept in pieces in the cache."""

import hashlib
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cl_bench.contracts import Samples, UsageError
from cl_bench.data import alone, cached, present
from cl_bench.features.backbone import Backbone

CHUNK = 1024
"""Samples of a piece: what a killed computation loses at most, in each of its processes."""

EVERY = 30.0
"""Seconds between two words on how far it is."""


class FeatureStore:
    """What a backbone makes of stored samples, computed once for all who ask.

    Pieces of :data:`CHUNK` samples lie in ``$CL_BENCH_CACHE/features/<key>/``; the key is a hash of
    weights, preprocessing and what is stored, so strategies, seeds, orders of classes and runs at
    the same time share them. Each is written in one piece or not at all, and has its hash in it,
    which is compared on reading: one that is damaged is said, and made anew.

    Args:
        backbone: makes the features.
        samples: of which.
        say: is told what takes long.

    Raises:
        UsageError: the samples are not what the backbone takes.
    """

    def __init__(
        self, backbone: Backbone, samples: Samples, say: Callable[[str], None] = print
    ) -> None:
        if samples.kind != backbone.kind:
            raise UsageError(
                f"backbone {backbone.layer} reads {backbone.kind}s, the stream's samples are "
                f"{samples.kind}s: use another backbone"
            )
        self.backbone = backbone
        self.samples = samples
        self.say = say
        parts = [backbone.identity, samples.identity, len(samples), CHUNK]
        self.key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
        self._chunks: dict[int, Tensor] = {}
        self._digests: dict[int, str] = {}

    def require(self, rows: Tensor) -> None:
        """Have the features of ``rows`` int64 (n,) at hand, from the cache or computed.

        Raises:
            UsageError: the backbone does not take the samples.
        """
        wanted = torch.unique(rows // CHUNK).tolist()
        missing = [chunk for chunk in wanted if chunk not in self._chunks]
        told = time.monotonic()
        began, made = told, 0
        for done, chunk in enumerate(missing):
            name = f"features/{self.key}/{chunk:05d}"
            found = present(name)
            if found is None:
                if made == 0:
                    there = f", {done} are there" if done else ""
                    self.say(
                        f"features of {len(self.samples):,} stored samples by "
                        f"{self.backbone.layer}: {len(missing)} pieces of {CHUNK:,}{there}"
                    )
                with alone(f"features/{self.key}", "each compute the features"):
                    found = cached(name, partial(self._computed, chunk))
                made += 1
            tensors, self._digests[chunk] = found
            self._chunks[chunk] = tensors["features"]
            if made and time.monotonic() - told > EVERY:
                told = time.monotonic()
                left = (told - began) / made * (len(missing) - done - 1)
                self.say(f"features: {done + 1} of {len(missing)} pieces, {left:.0f} s left")

    def __getitem__(self, rows: Tensor) -> Tensor:
        """float32 (n, d) of ``rows`` int64 (n,)."""
        self.require(rows)
        chunks = rows // CHUNK
        out: Tensor | None = None
        for chunk in torch.unique(chunks).tolist():
            inside = torch.nonzero(chunks == chunk).flatten()
            found = self._chunks[chunk][rows[inside] - chunk * CHUNK]
            if out is None:
                out = found.new_empty(len(rows), found.shape[1])
            out[inside] = found
        return torch.empty(0, self.width) if out is None else out

    @property
    def width(self) -> int:
        """d; something must be at hand."""
        return int(next(iter(self._chunks.values())).shape[1])

    @property
    def fingerprint(self) -> str:
        """Hash of all the features that are at hand."""
        parts: list[Any] = [self.key, sorted(self._digests.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _computed(self, chunk: int) -> dict[str, Tensor]:
        first = chunk * CHUNK
        rows = torch.arange(first, min(first + CHUNK, len(self.samples)))
        return {"features": self.backbone.features(self.samples, rows)}
