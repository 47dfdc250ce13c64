"""The trust boundary: clients' uploads go in, one sum comes out."""

from typing import Protocol

import torch
from torch import Tensor

from cl_bench.contracts import UsageError, derive_seed
from cl_bench.federation.upload import Upload, tensor_bytes


class Reducer(Protocol):
    """Sums the uploads of one round.

    Attributes:
        received: bytes that came in.
    """

    received: int

    def add(self, client: int, upload: Upload) -> None:
        """Take in what a client sent."""

    def result(self) -> Upload | None:
        """The sum; None if nobody sent anything."""


class PlainReducer:
    """Adds up in the open. The server could look at every upload, and never does."""

    def __init__(self) -> None:
        self.received = 0
        self._sums: dict[str, Tensor] | None = None
        self._steps = 0
        self._seconds = 0.0

    def add(self, client: int, upload: Upload) -> None:
        """Take in what a client sent."""
        self.received += upload.nbytes
        self._steps += upload.steps
        self._seconds += upload.seconds
        if self._sums is None:
            self._sums = {name: value.clone() for name, value in upload.sums.items()}
        else:
            for name, value in upload.sums.items():
                self._sums[name].add_(value)

    def result(self) -> Upload | None:
        """The sum; None if nobody sent anything."""
        return None if self._sums is None else Upload(self._sums, self._steps, self._seconds)


class MaskedReducer:
    """A simulation of secure aggregation (Bonawitz et al., CCS 2017): no cryptography.

    Numbers become 64-bit integers, value * 2^fraction_bits. Every two clients i < j share a mask,
    uniform over all integers, which i adds and j subtracts, modulo 2^64: a single upload is
    uniformly distributed, the sum is exact. Here one process knows all seeds, and clients that
    drop out do so before masks are agreed on, so nothing is said about keys or recovery.

    Args:
        clients: everybody who will send something.
        fraction_bits: the resolution of a number is 2^-fraction_bits.
        seed: of the masks.
    """

    def __init__(self, clients: list[int], fraction_bits: int, seed: int) -> None:
        self.clients = clients
        self.fraction_bits = fraction_bits
        self.seed = seed
        self.received = 0
        self._masked: dict[str, Tensor] | None = None
        self._dtypes: dict[str, torch.dtype] = {}
        self._steps = 0
        self._seconds = 0.0

    def masked(self, client: int, upload: Upload) -> dict[str, Tensor]:
        """What leaves the client: int64, uniform whatever was uploaded.

        Raises:
            UsageError: a number is too large for the sum to be exact; nothing is ever clipped.
        """
        limit = 2.0 ** (62 - self.fraction_bits) / max(1, len(self.clients))
        found = {}
        for name, value in upload.sums.items():
            largest = float(value.abs().max()) if value.numel() else 0.0
            if not largest < limit:
                raise UsageError(
                    f"federation.fraction_bits={self.fraction_bits} leaves room for numbers below "
                    f"{limit:.3g}, but a client has {largest:.3g} in {name!r}: lower fraction_bits"
                )
            exact = (value.double() * 2.0**self.fraction_bits).round().to(torch.int64)
            found[name] = exact
        for other in self.clients:
            if other == client:
                continue
            low, high = min(client, other), max(client, other)
            rng = torch.Generator().manual_seed(derive_seed(self.seed, "mask", low, high))
            for name, value in found.items():
                mask = torch.empty(value.shape, dtype=torch.int64)
                mask.random_(-(2**63), None, generator=rng)
                found[name] = value + mask if client == low else value - mask
        return found

    def add(self, client: int, upload: Upload) -> None:
        """Take in what a client sent, masked."""
        self._steps += upload.steps
        self._seconds += upload.seconds
        self._dtypes = {name: value.dtype for name, value in upload.sums.items()}
        masked = self.masked(client, upload)
        self.received += tensor_bytes(masked)
        if self._masked is None:
            self._masked = masked
        else:
            self._masked = {name: self._masked[name] + value for name, value in masked.items()}

    def result(self) -> Upload | None:
        """The sum; None if nobody sent anything."""
        if self._masked is None:
            return None
        sums = {
            name: (value.double() / 2.0**self.fraction_bits).to(self._dtypes[name])
            for name, value in self._masked.items()
        }
        return Upload(sums, self._steps, self._seconds)
