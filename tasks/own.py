"""Streams of what is at hand in Python: data sets, tensors, folders."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_bench.contracts import stream as contract
from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.randomness import generator
from cl_bench.contracts.stream import Scenario
from cl_bench.tasks.chat import Chat
from cl_bench.tasks.conversations.rows import SUFFIXES
from cl_bench.tasks.images.files import IMAGE_SUFFIXES
from cl_bench.tasks.split_images import SplitImages
from cl_bench.tasks.tensors import Split, from_tensors

DataSets = Sequence[Any] | Mapping[str, Any]
"""A data set of the package datasets a task, or ``{"train": ..., "test": ...}`` of such; by name
where it is a mapping."""


class Stream(contract.Stream):
    """The base of all streams, with three ways to make one of your own data."""

    from_tensors = staticmethod(from_tensors)

    @staticmethod
    def from_datasets(
        data: DataSets,
        *,
        image: str | None = None,
        label: str = "label",
        scenario: Scenario = "class",
        test_fraction: float = 0.2,
        split_seed: int = 0,
        **options: Any,
    ) -> contract.Stream:
        """A stream of data sets, one a task: of text, or of labelled images.

        Args:
            data: a data set a task, or a mapping of its ``train`` and, if there are any,
                ``validation`` and ``test`` data; in a mapping by task name, or in a list. Rows in
                lists of mappings will do as well.
            image: name of the column with images; None for text.
            label: name of the column with their labels: numbers from 0 or class labels.
            scenario: of images, what is known at test time.
            test_fraction: of images, share of a task's rows that is test data, where there is none.
            split_seed: decides which.
            options: of text, those of :class:`~cl_bench.tasks.chat.Chat`.

        Raises:
            UsageError: what was given does not make such a stream.
        """
        named = dict(data) if isinstance(data, Mapping) else {}
        named = named or {f"task_{i}": part for i, part in enumerate(data)}
        if image is None:
            sources = [{"name": name, "rows": rows} for name, rows in named.items()]
            return Chat(data=sources, test_fraction=test_fraction, split_seed=split_seed, **options)
        if options:
            raise UsageError(f"{', '.join(options)}: options of text, and image={image} is given")
        tasks = [
            _images(name, part, image, label, test_fraction, split_seed)
            for name, part in named.items()
        ]
        made = from_tensors(tasks, scenario, labels="task", names=list(named), name="datasets")
        for task, part in zip(made, named.values(), strict=True):
            names = _class_names(_sides(part)["train"], label)
            if names:
                task.facts = {**task.facts, "class_names": names}
        return made

    @staticmethod
    def from_folder(path: Path | str, **options: Any) -> contract.Stream:
        """A stream of a folder: of images, one folder a class; or of rows, a file or folder a task.

        Args:
            path: with ``<class>/*.png``, in ``train`` and ``test`` or, divided by
                ``test_fraction``, without; or with ``*.jsonl``, ``*.parquet`` or folders of them.
            options: of :class:`~cl_bench.tasks.split_images.SplitImages`, or of
                :class:`~cl_bench.tasks.chat.Chat`.

        Raises:
            UsageError: the folder holds neither.
        """
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise UsageError(f"{path}: no such folder")
        if any(p.suffix.lower() in IMAGE_SUFFIXES for p in folder.rglob("*")):
            return SplitImages(data_dir=str(folder), **options)
        parts = sorted(p for p in folder.iterdir() if p.is_dir() or p.name.endswith(SUFFIXES))
        if not parts:
            raise UsageError(f"{path}: holds no images, nor any of {', '.join(SUFFIXES)}")
        return Chat(data=[str(part) for part in parts], **options)


def _sides(part: Any) -> dict[str, Any]:
    """Data sets of a task by side."""
    return dict(part) if isinstance(part, Mapping) else {"train": part}


def _class_names(rows: Any, label: str) -> list[str]:
    features = getattr(rows, "features", None) or {}
    return list(getattr(features.get(label), "names", None) or ())


def _images(
    name: str, part: Any, image: str, label: str, test_fraction: float, seed: int
) -> dict[str, Split]:
    found = {side: _tensors(rows, image, label, f"{name}, {side}") for side, rows in
             _sides(part).items()}  # fmt: skip
    if "train" not in found:
        raise UsageError(f"task {name!r}: has {', '.join(found)}, but no train")
    if "test" not in found:
        x, y = found["train"]
        order = torch.randperm(len(y), generator=generator(seed, "test", name))
        held = torch.zeros(len(y), dtype=torch.bool)
        for c in torch.unique(y).tolist():
            own = order[y[order] == c]
            held[own[: max(1, int(test_fraction * len(own)))]] = True
        found["train"], found["test"] = (x[~held], y[~held]), (x[held], y[held])
    return found


def _tensors(rows: Any, image: str, label: str, where: str) -> Split:
    """float32 images (n, channels, height, width) in [0, 1], and labels."""
    import numpy as np

    pixels, labels = [], []
    for i, row in enumerate(rows, 1):
        for key in (image, label):
            if row.get(key) is None:
                raise UsageError(f"{where}: row {i} has no {key!r}; there are {', '.join(row)}")
        array = np.asarray(row[image])
        pixels.append(torch.from_numpy(array.copy()).reshape(*array.shape[:2], -1))
        labels.append(row[label])
    shapes = {tuple(p.shape) for p in pixels}
    if len(shapes) != 1:
        raise UsageError(f"{where}: images of shapes {sorted(shapes)}; give all one, and some")
    if not all(type(value) is int for value in labels):
        raise UsageError(f"{where}: labels must be whole numbers from 0, or class labels")
    x: Tensor = torch.stack(pixels).permute(0, 3, 1, 2)
    return x.float() / 255, torch.tensor(labels, dtype=torch.int64)
