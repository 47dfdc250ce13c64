"""Random numbers that depend on names, never on what ran before."""

import hashlib

import torch


def derive_seed(seed: int, *keys: str | int) -> int:
    """A 63-bit seed that is a pure function of ``seed`` and ``keys``, on every platform.

    ``derive_seed(seed, "order", task, epoch)`` is how data order, dropout and samples stay
    independent of each other and of how often something was evaluated in between.
    """
    digest = hashlib.sha256(repr((int(seed), *keys)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *keys: str | int) -> torch.Generator:
    """A CPU generator seeded with :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *keys))
