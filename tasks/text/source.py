"""Labelled texts with their splits, from files or the hub, before they are arranged into tasks."""

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.randomness import generator
from cl_bench.contracts.stream import Origin
from cl_bench.hub import hub_reachable
from cl_bench.tasks.arguments import require
from cl_bench.tasks.images.files import natural

Rows = list[tuple[str, Any]]
"""(text, label) pairs."""


@dataclass(frozen=True)
class StoredTexts:
    """All texts of a side.

    Attributes:
        texts: in the order of the data.
        identity: of content and order.
    """

    texts: Sequence[str]
    identity: str
    kind: Literal["text"] = "text"

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Tensor) -> list[str]:
        """The texts at ``index`` int64 (n,)."""
        return [self.texts[i] for i in index.tolist()]


@dataclass(frozen=True)
class TextSource:
    """Texts and labels, the same for every task.

    Attributes:
        train: training texts.
        train_labels: int64, positions in ``class_names``.
        test: test texts.
        test_labels: the same.
        class_names: by label.
        fingerprint: content hash.
        origin: licence, source, citation.
    """

    train: StoredTexts
    train_labels: Tensor
    test: StoredTexts
    test_labels: Tensor
    class_names: Sequence[str]
    fingerprint: str
    origin: Origin


def load_texts(
    dataset: str | None,
    data_dir: str | None,
    files: tuple[str, str | None],
    columns: tuple[str, str],
    test_fraction: float,
    split_seed: int,
    licence: str,
    citation: str,
) -> TextSource:
    """Labelled texts.

    Args:
        dataset: hub id; used where ``data_dir`` is None.
        data_dir: folder with the files.
        files: name patterns (on the hub: names) of the training and the test split; without a test
            split, test data is taken out of the training rows.
        columns: names of the text and the label column.
        test_fraction: share of each class's rows that is test data where there is no test split.
        split_seed: decides which.
        licence: for the record.
        citation: for the record.

    Raises:
        UsageError: data is missing, or not of this form.
    """
    if data_dir is None:
        require(dataset is not None, "data_dir", None, "name a folder, or stream.dataset=org/name")
        assert dataset is not None
        rows, names = _from_hub(dataset, files, columns)
        source = dataset
    else:
        folder = Path(data_dir).expanduser()
        require(folder.is_dir(), "data_dir", data_dir, "no such folder")
        read = [None if f is None else _read(folder, f, key, columns) for f, key in _keys(files)]
        rows, names = [r for r, _ in filter(None, read)], next(n for _, n in filter(None, read))
        source = str(folder)
    values = sorted({label for _, label in rows[0]}, key=_order)
    if names is None:
        names = [str(value) for value in values]
        position = {value: i for i, value in enumerate(values)}
    else:
        position = {i: i for i in range(len(names))}
    for _, label in (row for part in rows for row in part):
        if label not in position:
            remedy = f"{label!r} is no class of the training data"
            require(False, "label_column", columns[1], remedy)
    labels = [torch.tensor([position[v] for _, v in part], dtype=torch.int64) for part in rows]
    texts = [[text for text, _ in part] for part in rows]
    if len(rows) == 1:
        texts, labels = _carved(texts[0], labels[0], test_fraction, split_seed)
    prints = [hashlib.sha256(json.dumps(part).encode()).hexdigest() for part in texts]
    parts = [*prints, *(part.tolist() for part in labels), list(names)]
    return TextSource(
        StoredTexts(texts[0], prints[0]),
        labels[0],
        StoredTexts(texts[1], prints[1]),
        labels[1],
        names,
        hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
        Origin(source, licence, citation),
    )


def _keys(files: tuple[str, str | None]) -> list[tuple[str | None, str]]:
    return [(files[0], "train"), (files[1], "test")]


def _order(value: Any) -> Any:
    return (0, value, "") if isinstance(value, int) else (1, 0, natural(str(value)))


def _carved(
    texts: list[str], labels: Tensor, fraction: float, seed: int
) -> tuple[list[list[str]], list[Tensor]]:
    """Training and test rows, each in the data's order; of every class the same share is tested."""
    order = torch.randperm(len(texts), generator=generator(seed, "test split"))
    held = torch.zeros(len(texts), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        own = order[labels[order] == label]
        held[own[: int(fraction * len(own))]] = True
    found = [torch.nonzero(part).flatten() for part in (~held, held)]
    return [[texts[i] for i in rows.tolist()] for rows in found], [labels[rows] for rows in found]


def _read(
    folder: Path, pattern: str, key: str, columns: tuple[str, str]
) -> tuple[Rows, list[str] | None]:
    paths = sorted(p for p in folder.glob(pattern) if p.is_file())
    there = ", ".join(sorted(p.name for p in folder.iterdir())[:12])
    require(bool(paths), key, pattern, f"no such file in {folder}; there are {there or 'none'}")
    rows: Rows = []
    names: list[str] | None = None
    for path in paths:
        if path.suffix == ".parquet":
            found, names = _parquet(path, columns)
        else:
            found = _json_lines(path, columns)
        rows += found
    require(bool(rows), key, pattern, "holds no rows")
    return rows, names


def _json_lines(path: Path, columns: tuple[str, str]) -> Rows:
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
        # Not splitlines: texts hold characters that Unicode, unlike JSON lines, ends a line with.
        lines = [json.loads(line) for line in text.split("\n") if line.strip()]
        return [(str(row[columns[0]]), row[columns[1]]) for row in lines]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: not lines of {{{columns[0]}, {columns[1]}}} ({type(error).__name__}: "
            f"{error}); name the columns in stream.text_column and stream.label_column"
        ) from error


def _parquet(path: Path, columns: tuple[str, str]) -> tuple[Rows, list[str] | None]:
    import datasets
    import pyarrow.parquet

    try:
        features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(path))
        table = pyarrow.parquet.read_table(path, columns=list(columns)).to_pydict()
        rows = list(zip(map(str, table[columns[0]]), table[columns[1]], strict=True))
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{path}: no parquet file with columns {', '.join(columns)} ({error}); name them in "
            "stream.text_column and stream.label_column"
        ) from error
    return rows, getattr(features[columns[1]], "names", None)


def _from_hub(
    dataset: str, files: tuple[str, str | None], columns: tuple[str, str]
) -> tuple[list[Rows], list[str] | None]:
    import datasets

    reachable = not datasets.config.HF_HUB_OFFLINE and hub_reachable()
    try:
        found = datasets.load_dataset(dataset)
        splits = [found[name] for name in files if name is not None]
        rows = [
            list(zip(map(str, split[columns[0]]), split[columns[1]], strict=True))
            for split in splits
        ]
    except Exception as error:  # network, spelling, access, columns: all for the user
        where = "" if reachable else "; the hub cannot be reached from here"
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"stream.dataset={dataset}: cannot be read ({reason}{where})") from error
    return rows, getattr(splits[0].features[columns[1]], "names", None)
