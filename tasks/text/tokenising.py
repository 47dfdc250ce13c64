"""Tokens of many rows, made once: ``datasets.map`` keeps them in ``$CL_BENCH_CACHE``."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cl_bench.data import alone, cache_directory

LEAST = 1000
"""Rows from which on it pays to keep their tokens."""

FORMAT = 1
"""Counts up whenever the same rows lead to other tokens."""


def tokenised(
    count: int,
    make: Callable[[int], Mapping[str, Any]],
    features: Mapping[str, Any],
    depends_on: object,
) -> Any:
    """What ``make`` gives for every row, as a data set of the package datasets.

    Of several processes one makes it. What it raises is raised.

    Args:
        count: of the rows.
        make: a row's columns, by its number.
        features: their types, as the package writes them.
        depends_on: all that they follow from, as JSON.
    """
    import datasets
    import pyarrow

    told = json.dumps([FORMAT, depends_on], sort_keys=True)
    identity = f"tokens-{hashlib.sha256(told.encode()).hexdigest()}"

    def batch(given: Mapping[str, list[int]]) -> dict[str, list[Any]]:
        rows = [make(number) for number in given["row"]]
        return {name: [row[name] for row in rows] for name in features}

    numbers = datasets.Dataset.from_dict({"row": list(range(count))})
    options: dict[str, Any] = {
        "batched": True,
        "features": datasets.Features(features),
        "remove_columns": ["row"],
        "new_fingerprint": identity[:64],
    }
    path = cache_directory() / f"{identity}.arrow"
    with _quiet(datasets), alone(identity, "tokenise the same rows"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return numbers.map(batch, cache_file_name=str(path), **options)
        except (OSError, pyarrow.ArrowInvalid) as error:
            warnings.warn(
                f"cannot keep tokens in {path} ({error}); they are made again at every start: "
                "remove that file, or set CL_BENCH_CACHE to a writable folder",
                stacklevel=3,
            )
            return numbers.map(batch, keep_in_memory=True, load_from_cache_file=False, **options)


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Inside, the package shows no progress."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
