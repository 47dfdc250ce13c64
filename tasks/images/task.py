"""One task over a shared image source."""

import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from cl_bench.contracts.randomness import generator
from cl_bench.contracts.stream import Batch, Data, Origin, Task
from cl_bench.contracts.task import Side, Stored
from cl_bench.data import MemoryData
from cl_bench.tasks.augmented import Augmented, Transform
from cl_bench.tasks.images.source import Pixels, row_chunks
from cl_bench.tasks.images.views import View


class StoredImages:
    """All images of a side, arranged, before they are normalised.

    Args:
        pixels: uint8 images.
        view: with what is done to them, and the pixel value that becomes 1.
        name: of their content, such as a source's fingerprint and the side.
    """

    kind: Literal["image"] = "image"

    def __init__(self, pixels: Pixels, view: View, name: str) -> None:
        self.pixels = pixels
        self.view = view
        self.identity = f"{name} {view.arrange.identity}".strip()

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: Tensor) -> Tensor:
        """float32 (n, c, h, w) in [0, 1]."""
        return self.view.arrange(self.pixels[index]).float() / self.view.maximum


class ImageData:
    """Some rows of an image source as one task sees them, made when they are fetched.

    Args:
        pixels: uint8 images.
        rows: int64 (n,) which of them.
        y: int64 (n,) their positions in the stream's label space.
        view: uint8 images to float32 inputs.
        task: index to add under ``task``, where the task id is known at test time.
        name: of the images' content and order.
    """

    def __init__(
        self, pixels: Pixels, rows: Tensor, y: Tensor, view: View, task: int | None, name: str
    ) -> None:
        self.pixels = pixels
        self.rows = rows
        self.y = y
        self.view = view
        self.task = task
        self.name = name

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def stored(self) -> Stored:
        """The same as rows of all the images."""
        labels = {"y": self.y}
        if self.task is not None:
            labels["task"] = torch.full_like(self.y, self.task)
        return Stored(StoredImages(self.pixels, self.view, self.name), self.rows, labels)

    def __getitem__(self, index: Tensor) -> Batch:
        """``x`` float32 (n, c, h, w), ``y`` int64 (n,) and perhaps ``task`` int64 (n,)."""
        y, rows, pixels = self.y[index], self.rows[index], self.pixels
        # On images of few bytes a tensor's own indexing is several times slower.
        images = pixels.index_select(0, rows) if isinstance(pixels, Tensor) else pixels[rows]
        batch = {"x": self.view(images), "y": y}
        if self.task is not None:
            batch["task"] = torch.full_like(y, self.task)
        return batch

    def materialise(self, chunk: int = 2048) -> MemoryData:
        """All samples as ready tensors; needs little more memory than they do."""
        parts = self[torch.arange(0)]
        tensors = {k: v.new_empty((len(self), *v.shape[1:])) for k, v in parts.items()}
        for index in row_chunks(len(self), chunk):
            for name, part in self[index].items():
                tensors[name][index[0] : index[-1] + 1] = part
        return MemoryData(tensors)


class ImageTask(Task):
    """A task whose splits are :class:`ImageData`.

    Args:
        name: unique within the stream.
        index: position in the stream.
        head: which output head serves it.
        classes: its positions in the stream's label space.
        labels: the data set's own labels in the order of ``classes``.
        class_names: their names, in that order; recorded.
        origin: licence, source, citation.
        train: training samples, validation taken out.
        validation: samples held out of training.
        test: test samples.
        in_memory: hand out ready tensors; otherwise every fetch decodes and transforms.

    Attributes:
        augment: what training does to its images; None leaves them as they are.
    """

    augment: Transform | None = None

    def __init__(
        self,
        *,
        name: str,
        index: int,
        head: int,
        classes: range,
        labels: list[int],
        class_names: Sequence[str],
        origin: Origin,
        train: ImageData,
        validation: ImageData,
        test: ImageData,
        in_memory: bool,
    ) -> None:
        self.name = name
        self.index = index
        self.head = head
        self.classes = classes
        self.labels = labels
        self.facts = {"class_names": list(class_names)} if class_names else {}
        self.origin = origin
        self.in_memory = in_memory
        self._train = train
        self._validation = validation
        self._test = test
        self._held: weakref.ref[MemoryData] | None = None

    @property
    def train(self) -> Data:
        """Training data: tensors that live as long as somebody holds them."""
        return self._plain if self.augment is None else Augmented(self._plain, self.augment)

    @property
    def _plain(self) -> Data:
        if not self.in_memory:
            return self._train
        data = self._held() if self._held else None
        if data is None:
            data = self._train.materialise()
            self._held = weakref.ref(data)
        return data

    @cached_property
    def validation(self) -> Data:
        """Held-out training data; empty if ``validation_fraction`` is 0."""
        return self._validation.materialise() if self.in_memory else self._validation

    @cached_property
    def test(self) -> Data:
        """Test data, kept once made: it is evaluated after every task."""
        return self._test.materialise() if self.in_memory else self._test

    def stored(self, side: Side) -> Stored:
        """The images of a side as they are stored."""
        data = {"train": self._train, "validation": self._validation, "test": self._test}
        return replace(data[side].stored, augmented=side == "train" and self.augment is not None)

    def sample(self, n: int, seed: int) -> Batch:
        """:meth:`Task.sample`, without making the whole training set for a few rows."""
        data: Data = (self._held() if self._held else None) or self._train
        order = torch.randperm(len(data), generator=generator(seed, "sample", self.index))
        return data[order[:n]]
