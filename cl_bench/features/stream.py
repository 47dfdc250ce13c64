"""A stream seen through a frozen backbone: inputs are features."""

import hashlib
import json
import weakref
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from cl_bench.contracts import Data, Side, Stored, Stream, Task, UsageError
from cl_bench.data import MemoryData
from cl_bench.features.backbone import Backbone
from cl_bench.features.overlap import overlap
from cl_bench.features.store import FeatureStore

SIDES: tuple[Side, ...] = ("train", "validation", "test")


class FeatureTask(Task):
    """A task whose inputs are features (n, d).

    Args:
        task: whose samples they are.
        sides: its data as it is stored, with the features of each.
    """

    def __init__(self, task: Task, sides: dict[Side, tuple[Stored, FeatureStore]]) -> None:
        self.name, self.index, self.classes = task.name, task.index, task.classes
        self.head, self.metric, self.epochs = task.head, task.metric, task.epochs
        self.rate, self.facts, self.origin = task.rate, task.facts, task.origin
        self.ordered, self.kind = task.ordered, task.kind
        self._sides = sides
        self._held: weakref.ref[MemoryData] | None = None

    def _data(self, side: Side) -> MemoryData:
        stored, store = self._sides[side]
        return MemoryData({"x": store[stored.rows], **stored.labels})

    @property
    def train(self) -> Data:
        """Training data: tensors that live as long as somebody holds them."""
        data = self._held() if self._held else None
        if data is None:
            data = self._data("train")
            self._held = weakref.ref(data)
        return data

    @cached_property
    def validation(self) -> Data:
        """Held-out training data; may be empty."""
        return self._data("validation")

    @cached_property
    def test(self) -> Data:
        """Test data, kept once made."""
        return self._data("test")


class FeatureStream(Stream):
    """The tasks of a stream, their inputs replaced by what a frozen backbone makes of them.

    All features that the tasks need are computed, or read from the cache, when it is made.

    Args:
        stream: tells what is stored (:meth:`~cl_bench.contracts.Task.stored`).
        backbone: makes the features.
        say: is told what takes long.

    Raises:
        UsageError: the stream does not tell, has a network pre-trained, changes images at random in
            training, or stores what the backbone does not take.
    """

    def __init__(
        self, stream: Stream, backbone: Backbone, say: Callable[[str], None] = print
    ) -> None:
        if stream.pretraining is not None:
            raise UsageError(
                f"backbone: stream {stream.name!r} pre-trains its own network; leave +backbone out"
            )
        found = [{side: _stored(stream, task, side) for side in SIDES} for task in stream]
        backbone.prepare(found[0]["train"], say)
        stores: dict[str, FeatureStore] = {}
        tasks = []
        for task, stored in zip(stream, found, strict=True):
            for side in stored.values():
                name = side.samples.identity
                if name not in stores:
                    stores[name] = FeatureStore(backbone, side.samples, say)
            sides = {k: (side, stores[side.samples.identity]) for k, side in stored.items()}
            tasks.append(FeatureTask(task, sides))
        for store in stores.values():
            _fill(store, tasks)
        parts = [stream.fingerprint, *sorted(store.fingerprint for store in stores.values())]
        super().__init__(
            stream.name,
            tasks,
            stream.scenario,
            (next(iter(stores.values())).width,),
            hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
            modality="features",
            task_id_at_test=stream.task_id_at_test,
        )
        trained_on = getattr(backbone.network, "trained_on", None)
        shared = overlap(None if backbone.base else trained_on, stream)
        self.facts = {**stream.facts, "backbone": {**backbone.facts(), "overlap": shared}}


def _stored(stream: Stream, task: Task, side: Side) -> Stored:
    stored = task.stored(side)
    if stored is None:
        raise UsageError(
            f"backbone: stream {stream.name!r} does not tell what its samples are before it makes "
            "inputs of them; use one of images or texts with classes"
        )
    if stored.augmented:
        raise UsageError(
            f"backbone: task {task.name!r} of stream {stream.name!r} changes its images at random "
            "in training, and features are made of each once; leave stream.augment=none"
        )
    return stored


def _fill(store: FeatureStore, tasks: list[FeatureTask]) -> None:
    """Have at hand what the tasks need of one store, all at once."""
    rows: list[Tensor] = [
        stored.rows
        for task in tasks
        for stored, of in task._sides.values()
        if of is store and len(stored.rows)
    ]
    store.require(torch.cat(rows))
