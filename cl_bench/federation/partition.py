"""Who holds which samples of a task: a pure function of labels, settings and seed."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cl_bench.contracts import (
    Batch,
    Data,
    Stream,
    Task,
    UsageError,
    augmented,
    batch_sizes,
    derive_seed,
    generator,
)
from cl_bench.federation.settings import Federation

CHUNK = 4096
"""Samples whose labels are fetched at a time where they do not lie in memory."""


@dataclass(frozen=True)
class Partition:
    """The parts of one task's training data.

    Attributes:
        rows: positions of every client's samples (n_k,), by client; only clients that have some.
        counts: int64 (population, classes), samples by client and class.
    """

    rows: dict[int, Tensor]
    counts: Tensor

    @property
    def clients(self) -> list[int]:
        """Clients that hold data, ascending."""
        return sorted(self.rows)

    @property
    def version(self) -> str:
        """Hash of who holds what: equal versions are equal splits."""
        digest = hashlib.sha256()
        for client in self.clients:
            digest.update(f"{client}:{len(self.rows[client])}:".encode())
            digest.update(self.rows[client].numpy().tobytes())
        return digest.hexdigest()[:16]


def partition(task: Task, labels: Tensor, federation: Federation, seed: int) -> Partition:
    """Split a task's training data over its clients.

    Args:
        task: whose classes count.
        labels: of its training data (n,).
        federation: how.
        seed: of the run.

    Returns:
        The split; who gets no sample is not in it.
    """
    rng = generator(seed, "partition", task.index)
    N = federation.clients
    holders = torch.arange(federation.population)
    if federation.population > N:
        drawn = torch.randperm(
            federation.population, generator=generator(seed, "holders", task.index)
        )
        holders = drawn[:N].sort().values
    if federation.partition == "iid":
        parts = list(torch.tensor_split(torch.randperm(len(labels), generator=rng), N))
    elif federation.partition == "shards":
        shards = N * federation.shards_per_client
        pieces = torch.tensor_split(labels.argsort(stable=True), shards)
        dealt = torch.randperm(shards, generator=rng).view(N, -1)
        parts = [torch.cat([pieces[i] for i in own]) for own in dealt.tolist()]
    else:
        parts = _dirichlet(labels, N, federation.alpha, derive_seed(seed, "dirichlet", task.index))
    rows = {k: part for k, part in zip(holders.tolist(), parts, strict=True) if len(part)}
    counts = torch.zeros(federation.population, len(task.classes), dtype=torch.int64)
    for client, own in rows.items():
        counts[client] = torch.bincount(
            labels[own] - task.classes.start, minlength=len(task.classes)
        )
    return Partition(rows, counts)


def check_shares(federation: Federation, stream: Stream, seed: int) -> None:
    """Raise :class:`UsageError` if a client gets one sample, where a batch needs two."""
    for task in stream:
        split = partition(task, labels_of(task.train), federation, seed)
        lone = [client for client, rows in split.rows.items() if len(rows) == 1]
        if lone:
            raise UsageError(
                f"federation.partition={federation.partition}: client {lone[0]} gets one sample of "
                f"task {task.name!r}, and the network normalises by the batch: use fewer "
                "federation.clients, a larger federation.alpha, or another norm (model.norm=...)"
            )


def _dirichlet(labels: Tensor, clients: int, alpha: float, seed: int) -> list[Tensor]:
    rng = np.random.Generator(np.random.PCG64(seed))
    parts: list[list[Tensor]] = [[] for _ in range(clients)]
    for label in torch.unique(labels):
        rows = torch.from_numpy(rng.permutation((labels == label).nonzero().squeeze(1).numpy()))
        shares = rng.dirichlet(np.full(clients, alpha)).cumsum()
        cuts = torch.from_numpy((shares[:-1] * len(rows)).round().astype(np.int64))
        for part, piece in zip(parts, torch.tensor_split(rows, cuts), strict=True):
            part.append(piece)
    return [torch.cat(part) for part in parts]


def labels_of(data: Data) -> Tensor:
    """Labels (n,) of all samples."""
    held = getattr(data, "tensors", None)
    if held is not None and "y" in held:
        labels: Tensor = held["y"].cpu()
        return labels
    index = torch.split(torch.arange(len(data)), CHUNK)
    return torch.cat([data[i]["y"].cpu() for i in index])


class Part(Data):
    """Some samples of a data set.

    Args:
        data: the whole.
        rows: positions (n_k,) of the part.
    """

    def __init__(self, data: Data, rows: Tensor) -> None:
        self.data = data
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Batch:
        return self.data[self.rows[index]]

    def augmented(self, seed: int) -> "Part | None":
        """The same part of the whole as an epoch of training sees it."""
        view = augmented(self.data, seed)
        return None if view is None else Part(view, self.rows)


def in_order(data: Data, order: Tensor, batch_size: int, least: int = 1) -> Iterator[Batch]:
    """Batches in that order (n,), fetched many at a time; none has fewer than ``least``."""
    sizes, many = batch_sizes(len(order), batch_size, least), max(1, CHUNK // batch_size)
    done = 0
    for first in range(0, len(sizes), many):
        own = sizes[first : first + many]
        fetched = data[order[done : done + sum(own)]]
        done += sum(own)
        names = list(fetched)
        for values in zip(*(torch.split(v, own) for v in fetched.values()), strict=True):
            yield dict(zip(names, values, strict=True))


class ClientTask(Task):
    """A task as one client sees it: its own training data, and nothing to be tested on."""

    def __init__(self, task: Task, data: Part) -> None:
        self.name, self.index, self.classes, self.head = (
            task.name,
            task.index,
            task.classes,
            task.head,
        )
        self.metric, self.rate, self.facts, self.origin = (
            task.metric,
            task.rate,
            task.facts,
            task.origin,
        )
        self.kind = task.kind
        self._data = data

    @property
    def train(self) -> Part:
        """The client's own samples."""
        return self._data

    @property
    def validation(self) -> Part:
        """None."""
        return Part(self._data.data, self._data.rows[:0])

    test = validation
