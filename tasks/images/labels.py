"""Labels of a data set's splits as numbers that mean one class in both."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl_bench.contracts.errors import UsageError
from cl_bench.tasks.images.files import natural


def read_labels(
    splits: dict[str, Any], column: str, renumber: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """Labels of the splits ``train`` and ``test``, and the names of the classes.

    Where both splits name their classes, a name is one class, whatever its number in either.

    Args:
        splits: each a ``datasets.Dataset``.
        column: name of the label column.
        renumber: count the values that occur in training from 0, in their order.

    Returns:
        int64 ``train_labels``, ``test_labels`` and their number ``num_classes`` (); names by label.

    Raises:
        UsageError: labels are no integers from 0, or test data has classes that training lacks.
    """
    values = {name: _values(split, name, column, renumber) for name, split in splits.items()}
    named = {name: getattr(s.features[column], "names", None) for name, s in splits.items()}
    if named["train"] is not None and named["test"] is not None:
        values["test"] = _by_name(values["test"], named["test"], named["train"], column)
    if renumber:
        present = _in_order(values["train"])
        known = named["train"]
        names = [str(v) if known is None else known[v] for v in present]
        values = {name: _positions(v, present, name, column) for name, v in values.items()}
        count = len(present)
    else:
        declared = getattr(splits["train"].features[column], "num_classes", None)
        count = int(values["train"].max()) + 1 if declared is None else declared
        if count > max(len(values["train"]), 1) and declared is None:
            raise UsageError(
                f"stream.label_column={column}: labels go up to {count - 1}, but the train split "
                f"has only {len(values['train'])} samples; correct the labels, or number those "
                "that occur with stream.renumber_labels=true"
            )
        names = named["train"] or [str(i) for i in range(count)]
    labels = {f"{name}_labels": torch.from_numpy(v.astype(np.int64)) for name, v in values.items()}
    return {**labels, "num_classes": torch.tensor(count)}, names


def _values(split: Any, name: str, column: str, renumber: bool) -> Any:
    stored = split.select_columns([column])
    missing = stored.with_format("arrow")[:].column(column).is_null().to_numpy()
    if missing.any():
        raise UsageError(
            f"stream.label_column={column}: row {int(missing.argmax()) + 1} of the {name} split "
            f"has no label ({int(missing.sum())} rows in all); label those rows, or take them out"
        )
    values = stored.with_format("numpy")[:][column]
    whole = values.ndim == 1 and np.issubdtype(values.dtype, np.integer)
    text = (
        values.ndim == 1 and values.dtype.kind in "UO" and all(isinstance(v, str) for v in values)
    )
    if whole or (renumber and text):
        return values
    also = ", or number them with stream.renumber_labels=true" if text else ""
    raise UsageError(
        f"stream.label_column={column}: labels must be integers from 0, the {name} split holds "
        f"{split.features[column]}; cast the column to datasets.ClassLabel, or name another{also}"
    )


def _by_name(values: Any, own: list[str], trained: list[str], column: str) -> Any:
    if own == trained:
        return values
    position = {name: i for i, name in enumerate(trained)}
    moved = np.array([position.get(name, -1) for name in own], dtype=np.int64)
    inside = (values >= 0) & (values < len(own))
    found = np.where(inside, moved[np.where(inside, values, 0)], values)
    lacking = sorted({own[v] for v in values[inside & (found < 0)].tolist()})
    if lacking:
        raise UsageError(
            f"stream.label_column={column}: the test split has classes that the train split does "
            f"not name: {', '.join(lacking)}; name the classes alike in both"
        )
    return found


def _in_order(values: Any) -> list[Any]:
    present = np.unique(values).tolist()
    return sorted(present, key=natural) if values.dtype.kind in "UO" else present


def _positions(values: Any, present: list[Any], split: str, column: str) -> Any:
    position = {value: i for i, value in enumerate(present)}
    given = values.tolist()
    strange = sorted({str(v) for v in given if v not in position or (v == -1)})
    if strange:
        raise UsageError(
            f"stream.renumber_labels=true: the {split} split has labels {', '.join(strange)} in "
            f"column {column!r}, which are no classes of the train split; take those rows out"
        )
    return np.array([position[v] for v in given], dtype=np.int64)
