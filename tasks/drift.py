"""Streams of data whose concept drifts, by river's generators, and two sets that river ships.

Every task is a stretch of the stream. What it is scored on are samples of the same stretch, every
``train_samples / test_samples``-th, which are not learned.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.options import Count, Index, PartShare, Rate, Seed, SomeShare
from cl_bench.contracts.stream import Origin, Stream
from cl_bench.tasks.arguments import require
from cl_bench.tasks.tensors import TensorTask, fingerprint_of

Name = Literal["sea", "sine", "hyperplane", "rbf", "phishing", "bananas"]
SETS = ("phishing", "bananas")
CITATION = "Montiel et al., River: machine learning for streaming data in Python, JMLR 2021"
GENERATED = Origin("river.datasets.synth", "BSD-3-Clause", CITATION, generated=True)
SHIPPED = Origin("sets in river.datasets", "not stated by river", CITATION)

Row = tuple[Mapping[Any, Any], Any]
"""Features by name, and a label, as river has them."""


class DriftTask(TensorTask):
    """A stretch of a stream of data."""

    ordered = True


class Drift(Stream):
    """One of river's streams, cut into tasks; one head.

    ``sea`` and ``sine`` have four concepts, which take turns: drift comes at once where a task
    begins, or over ``width`` samples. ``hyperplane`` and ``rbf`` drift all the time, and their
    tasks are stretches. ``phishing`` and ``bananas`` are sets, in their order, cut into stretches.

    Args:
        data: which.
        num_tasks: stretches.
        train_samples: of every stretch of a generator; a set is divided evenly.
        test_samples: of every stretch of a generator, kept apart.
        test_share: of a set, kept apart.
        width: of ``sea`` and ``sine``: the share of the old concept falls from 1 to 0 over so many
            samples of a task.
        speed: of ``hyperplane`` and ``rbf``: how far the concept moves with a sample.
        noise: share of labels of ``sea`` and ``hyperplane`` that are wrong.
        seed: of the generators.

    Raises:
        UsageError: an argument is out of range, or river is not installed.
    """

    def __init__(
        self,
        data: Name = "sea",
        num_tasks: Count = 4,
        train_samples: Count = 5000,
        test_samples: Count = 500,
        test_share: SomeShare = 0.1,
        width: Index = 0,
        speed: Rate = 0.001,
        noise: PartShare = 0.1,
        seed: Seed = 0,
    ) -> None:
        synth, sets = _river()
        if data in SETS:
            found = list(getattr(sets, data.capitalize())())
            sizes = [len(found) // num_tasks] * num_tasks
            every = round(1 / test_share)
            rows: Iterable[Row] = found
        else:
            require(
                test_samples <= train_samples,
                "test_samples",
                test_samples,
                f"at most train_samples={train_samples}",
            )
            sizes = [train_samples + test_samples] * num_tasks
            every = sizes[0] // test_samples
            rows = _rows(synth, data, sizes, width, speed, noise, seed)
        x, y = _tensors(itertools.islice(rows, sum(sizes)))
        origin = SHIPPED if data in SETS else GENERATED
        labels = range(int(y.max()) + 1)
        splits, tasks = [], []
        for t, (part_x, part_y) in enumerate(
            zip(torch.split(x, sizes), torch.split(y, sizes), strict=False)
        ):
            if t == num_tasks:
                break
            tested = torch.arange(len(part_y)) % every == every - 1
            split = {
                "train": (part_x[~tested], part_y[~tested]),
                "test": (part_x[tested], part_y[tested]),
            }
            splits.append(split)
            tasks.append(
                DriftTask(
                    t,
                    split["train"],
                    test=split["test"],
                    name=f"{data}_{t + 1}",
                    classes=labels,
                    origin=origin,
                    task_id=False,
                )
            )
        arguments = [data, num_tasks, sizes, every, width, speed, noise, seed]
        digest = hashlib.sha256(json.dumps(arguments).encode())
        digest.update(fingerprint_of(splits).encode())
        shape = tuple(x.shape[1:])
        super().__init__("drift", tasks, "domain", shape, digest.hexdigest())


def _river() -> tuple[Any, Any]:
    try:
        from river import datasets
        from river.datasets import synth
    except ImportError as error:
        raise UsageError(
            f"drift streams need the extra: pip install 'cl_bench[river]' ({error})"
        ) from None
    return synth, datasets


def _rows(
    synth: Any, data: str, sizes: list[int], width: int, speed: float, noise: float, seed: int
) -> Iterator[Row]:
    """All rows of a generator, stretch by stretch."""
    if data == "hyperplane":
        yield from synth.Hyperplane(
            seed=seed, n_features=10, n_drift_features=10, mag_change=speed, noise_percentage=noise
        )
    if data == "rbf":
        yield from synth.RandomRBFDrift(
            seed_model=seed,
            seed_sample=seed,
            n_classes=4,
            n_features=10,
            n_centroids=20,
            change_speed=speed,
            n_drift_centroids=20,
        )
    concept: Callable[[int, int], Any] = {
        "sea": lambda v, s: synth.SEA(variant=v, noise=noise, seed=s),
        "sine": lambda v, s: synth.Sine(classification_function=v, seed=s),
    }[data]
    rng = torch.Generator().manual_seed(seed)
    old: Iterator[Row] = iter(())
    for t, size in enumerate(sizes):
        new = iter(concept(t % 4, seed + t))
        for i in range(size):
            early = t > 0 and float(torch.rand((), generator=rng)) * width > i
            yield next(old if early else new)
        old = new


def _tensors(rows: Iterable[Row]) -> tuple[Tensor, Tensor]:
    values, labels = zip(*((list(x.values()), int(y)) for x, y in rows), strict=True)
    return torch.tensor(values, dtype=torch.float32), torch.tensor(labels)
