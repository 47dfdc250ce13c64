"""What is kept of old tasks: of everything seen, or the same number of every class or task."""

from collections.abc import Iterable, Iterator

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

from cl_bench.contracts import Batch, Data, State, Task, augmented, generator, likewise


def size(batch: Batch) -> int:
    """Number of samples in a batch."""
    return len(next(iter(batch.values())))


class Reservoir:
    """A uniform sample of everything that was offered (Vitter, 1985).

    Args:
        memory: samples kept at most.

    Attributes:
        buffer: the samples, and room for those to come.
        seen: how many were offered.
        rng: of what is kept and of what is drawn.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.buffer: Batch = {}
        self.seen = 0
        self.rng: Generator | None = None

    @property
    def filled(self) -> int:
        """How many are kept now."""
        return min(self.memory, self.seen)

    def begin(self, seed: int) -> None:
        """To be called before anything is offered or drawn; later calls do nothing."""
        self.rng = self.rng or generator(seed, "reservoir")

    def draw(self, wanted: int) -> Batch:
        """So many samples, uniform, with replacement."""
        index = torch.randint(self.filled, (wanted,), generator=self.rng)
        return {k: v[index] for k, v in self.buffer.items()}

    def offer(self, batch: Batch) -> None:
        """Reservoir sampling: the m-th sample seen takes slot j ~ U{0..m-1} if there is one.

        Rows may have become longer since the last call; what is kept has zeros there.
        """
        self._make_room(batch)
        count = size(batch)
        order = torch.arange(self.seen, self.seen + count)
        uniform = torch.rand(count, generator=self.rng, dtype=torch.float64)
        slots = torch.where(order < self.memory, order, (uniform * (order + 1)).long())
        last_writer = {slot: i for i, slot in enumerate(slots.tolist()) if slot < self.memory}
        if last_writer:
            to, source = torch.tensor(list(last_writer)), torch.tensor(list(last_writer.values()))
            for k, v in batch.items():
                self.buffer[k][to] = v[source].to(self.buffer[k])
        self.seen += count

    def _make_room(self, batch: Batch) -> None:
        for k, v in batch.items():
            if k not in self.buffer:
                self.buffer[k] = torch.zeros(self.memory, *v.shape[1:], dtype=v.dtype)
            elif v.dim() > 1 and v.shape[-1] > self.buffer[k].shape[-1]:
                self.buffer[k] = pad(self.buffer[k], (0, v.shape[-1] - self.buffer[k].shape[-1]))

    def state_dict(self) -> State:
        """The samples, how many were offered, and the random state."""
        rng: Tensor | None = None if self.rng is None else self.rng.get_state()
        # The buffer is written in place; a state must not be.
        buffer = {k: v.clone() for k, v in self.buffer.items()}
        return {"buffer": buffer, "seen": self.seen, "rng": rng}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.buffer = {k: v.clone() for k, v in state["buffer"].items()}
        self.seen = state["seen"]
        self.rng = None if state["rng"] is None else torch.Generator()
        if self.rng is not None:
            self.rng.set_state(state["rng"])


class Exemplars:
    """As many samples of every class, in an order; a class that must shrink keeps the first.

    Args:
        memory: samples kept at most, over all classes.

    Attributes:
        classes: the samples by class, the most wanted first.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.classes: dict[int, Batch] = {}

    def quota(self, classes: int) -> int:
        """Samples of each of so many classes."""
        return self.memory // max(1, classes)

    def take(self, data: Data, order: dict[int, Tensor]) -> None:
        """Add classes: for each, rows of ``data`` from the most wanted on; all others shrink."""
        quota = self.quota(len(self.classes.keys() | order.keys()))
        self.classes = {c: first(kept, quota) for c, kept in self.classes.items()}
        self.classes |= {c: dict(data[rows[:quota]]) for c, rows in order.items()}

    def __len__(self) -> int:
        return sum(map(size, self.classes.values()))

    def batch(self) -> Batch:
        """All samples, class by class."""
        kept = list(self.classes.values())
        return {k: torch.cat([part[k] for part in kept]) for k in kept[0]} if kept else {}

    def state_dict(self) -> State:
        """The samples by class."""
        return {"classes": {c: dict(kept) for c, kept in self.classes.items()}}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.classes = {c: dict(kept) for c, kept in state["classes"].items()}


class ByTask:
    """As many samples of every task, drawn when it ends.

    Args:
        memory: samples kept of each.

    Attributes:
        batch: all samples, task by task.
        sizes: how many are of each task.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.batch: Batch = {}
        self.sizes: list[int] = []

    def take(self, task: Task, seed: int) -> None:
        """Add a part of the task."""
        drawn = task.sample(self.memory, seed)
        before = self.batch or {k: v[:0] for k, v in drawn.items()}
        self.batch = {k: torch.cat([before[k], v]) for k, v in drawn.items()}
        self.sizes.append(size(drawn))

    def __len__(self) -> int:
        return sum(self.sizes)

    def tasks(self) -> list[Batch]:
        """The samples of each task."""
        parts = {k: torch.split(v, self.sizes) for k, v in self.batch.items()}
        return [{k: v[t] for k, v in parts.items()} for t in range(len(self.sizes))]

    def state_dict(self) -> State:
        """The samples, and how many are of each task."""
        return {"batch": dict(self.batch), "sizes": list(self.sizes)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.batch, self.sizes = dict(state["batch"]), list(state["sizes"])


def first(batch: Batch, count: int) -> Batch:
    """Its first samples, in memory of their own."""
    return {k: v[:count].clone() for k, v in batch.items()}


def herd(features: Tensor, count: int) -> Tensor:
    """Rows whose mean follows the mean of all (Welling, 2009; iCaRL, Rebuffi et al., 2017, Alg. 4).

    The k-th is argmin_f |mu - (S + f) / k|, S the sum of those before it: fewer are a prefix.

    Args:
        features: (n, d).
        count: how many; at most n are given.
    """
    mean, squared = features.mean(0), features.square().sum(1)
    left, found = mean.clone(), []
    taken = torch.zeros_like(squared)
    for _ in range(min(count, len(features))):  # left = k mu - S
        row = int((squared - 2 * features @ left + taken).argmin())
        found.append(row)
        taken[row] = torch.inf
        left += mean - features[row]
    return torch.tensor(found, dtype=torch.long, device="cpu")


def rows_by_class(labels: Tensor, classes: Iterable[int]) -> dict[int, Tensor]:
    """Where each class stands in ``labels`` (n,); classes without samples are left out."""
    found = {c: (labels == c).nonzero().flatten() for c in classes}
    return {c: rows for c, rows in found.items() if len(rows)}


def labels_of(task: Task) -> Tensor:
    """Of the training data, (n,)."""
    data = task.train
    tensors = getattr(data, "tensors", None)  # these lie in memory
    return tensors["y"] if tensors else torch.cat([batch["y"] for batch in in_pieces(data, 1000)])


def in_pieces(data: Data, count: int) -> Iterator[Batch]:
    """All samples as they are, in order, so many at a time."""
    for index in torch.split(torch.arange(len(data)), count):
        yield data[index]


def as_in_training(batch: Batch, like: Data, seed: int) -> Batch:
    """Samples changed at random where training changes ``like``."""
    view = augmented(likewise(like, Part(batch)), seed)
    if view is None:
        return batch
    found = view[torch.arange(size(batch))]
    return {k: found[k] for k in batch}


class Part(Data):
    """Samples in tensors, or some rows of other data.

    Args:
        data: batch or data.
        rows: of it; None takes all of a batch.
    """

    def __init__(self, data: Batch | Data, rows: Tensor | None = None) -> None:
        self.data = data
        self.rows = torch.arange(size(data)) if rows is None else rows  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> Batch:
        rows = self.rows[index]
        if isinstance(self.data, dict):
            return {k: v[rows] for k, v in self.data.items()}
        return self.data[rows]

    def augmented(self, seed: int) -> "Part | None":
        """As of the data itself."""
        view = None if isinstance(self.data, dict) else augmented(self.data, seed)
        return None if view is None else Part(view, self.rows)

    def likewise(self, data: Data) -> Data:
        """As of the data itself."""
        return data if isinstance(self.data, dict) else likewise(self.data, data)
