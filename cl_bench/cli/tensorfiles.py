"""Weights in safetensors files, read and written one tensor at a time.

Nothing here reads a pickle. The format is a length of eight bytes, a header in JSON and the
tensors' bytes in order, so a file whose tensors are known by type and shape can be written from its
start, and what a killed process has written can be told from its size.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cl_bench.contracts import UsageError
from cl_bench.tracking.files import NO_LINKS, explained, read_json, write

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What a merge can hold, by the names of the format."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file.

    Attributes:
        name: of the tensor.
        dtype: a key of :data:`TYPES`.
        shape: of the tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return int(torch.Size(self.shape).numel()) * TYPES[self.dtype].itemsize

    @property
    def floating(self) -> bool:
        """Whether it holds numbers that can be averaged."""
        return TYPES[self.dtype].is_floating_point


class Weights:
    """A model's safetensors files: one, or a folder as ``save_pretrained`` writes it.

    Args:
        path: of the file or the folder.
        said: how it was named, for messages.

    Attributes:
        files: entries of every file, by its name; in the order in which they are read and written.

    Raises:
        UsageError: there are no such weights, or they cannot be read.
    """

    def __init__(self, path: Path, said: str) -> None:
        self.path, self.said = path, said
        self.folder = path if path.is_dir() else path.parent
        self.files: dict[str, list[Entry]] = {}
        self._open: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        for name in self._names():
            self.files[name] = list(self._read(name))

    def _names(self) -> list[str]:
        if not self.path.exists():
            raise UsageError(f"{self.said}: there is no such folder or file")
        if self.path.is_file():
            if self.path.suffix != ".safetensors":
                raise UsageError(f"{self.said}: only safetensors files are read, never pickles")
            return [self.path.name]
        if (self.path / INDEX).is_file():
            return self._indexed()
        found = sorted(p.name for p in self.path.glob("*.safetensors"))
        if len(found) == 1 or "model.safetensors" in found:
            return ["model.safetensors"] if "model.safetensors" in found else found
        if found:
            raise UsageError(f"{self.said}: holds {len(found)} safetensors files and no {INDEX}")
        pickles = any(p.suffix in PICKLES for p in self.path.iterdir())
        why = "only pickles, which are not read: save the model as safetensors" * pickles
        raise UsageError(f"{self.said}: holds {why or 'no safetensors file'}")

    def _indexed(self) -> list[str]:
        index = read_json(self.path / INDEX)
        names = index.get("weight_map") if isinstance(index, dict) else None
        found = sorted({str(n) for n in names.values()}) if isinstance(names, dict) else []
        plain = all(Path(n).name == n and n.endswith(".safetensors") for n in found)
        if not found or not plain:
            raise UsageError(f"{self.said}: {INDEX} names no safetensors files of that folder")
        return found

    def _read(self, name: str) -> Iterator[Entry]:
        try:
            file: Any = safe_open(self.folder / name, framework="pt")
            self._open[name] = file
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                view = file.get_slice(key)
                if view.get_dtype() not in TYPES:
                    raise UsageError(
                        f"{self.said}: {key} in {name} is of type {view.get_dtype()}, which "
                        "cannot be merged; save the model in bfloat16, float16 or float32"
                    )
                if key in self._where:
                    raise UsageError(f"{self.said}: {key} stands in two files")
                self._where[key] = name
                yield Entry(key, view.get_dtype(), tuple(view.get_shape()))
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{self.said}: {name} cannot be read ({error})") from error

    @property
    def entries(self) -> dict[str, Entry]:
        """All of them, by name."""
        return {e.name: e for entries in self.files.values() for e in entries}

    def get(self, name: str) -> Tensor:
        """The tensor of that name."""
        found: Tensor = self._open[self._where[name]].get_tensor(name)
        return found

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def identity(self) -> dict[str, list[int]]:
        """Size and time of each file, by its path: whether they are the ones of before."""
        found = {}
        for name in self.files:
            path = (self.folder / name).resolve()
            found[str(path)] = [path.stat().st_size, path.stat().st_mtime_ns]
        return found


class Sequential:
    """A safetensors file that is written tensor by tensor, and goes on where it was left.

    Args:
        path: of the file; links are not followed.
        entries: the tensors, in order.

    Attributes:
        done: how many of them are in the file.

    Raises:
        UsageError: the disk refuses.
    """

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        self.path, self.entries = path, entries
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at, ends = 0, []
        for entry in entries:
            start, at = at, at + entry.nbytes
            ends.append(at)
            header[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [start, at],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        with explained(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINKS, 0o666)
            size = os.fstat(self._file).st_size
            whole = size >= len(head) and os.pread(self._file, len(head), 0) == head
            self.done = sum(len(head) + end <= size for end in ends) if whole else 0
            os.ftruncate(self._file, len(head) + ends[self.done - 1] if self.done else 0)
            os.lseek(self._file, 0, os.SEEK_END)
            if not self.done:
                write(self._file, head)

    def append(self, tensor: Tensor) -> None:
        """Write the next tensor, in its entry's type; it is on disk afterwards."""
        entry = self.entries[self.done]
        assert tuple(tensor.shape) == entry.shape
        plain = tensor.to(TYPES[entry.dtype]).contiguous().cpu().reshape(-1)
        with explained(self.path):
            if plain.numel():
                write(self._file, memoryview(plain.view(torch.uint8).numpy()))  # type: ignore[arg-type]
            os.fsync(self._file)
        self.done += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def require_same(base: Weights, model: Weights, skipped: Sequence[str]) -> None:
    """Raise :class:`UsageError` unless both have tensors of the same names and shapes.

    Args:
        base: what the model was fine-tuned from.
        model: the model.
        skipped: names that need not agree.
    """
    ours, theirs = (
        {n: e.shape for n, e in w.entries.items() if n not in skipped} for w in (base, model)
    )
    for missing, here, there in (
        (ours.keys() - theirs.keys(), base, model),
        (theirs.keys() - ours.keys(), model, base),
    ):
        if missing:
            name = min(missing)
            raise UsageError(
                f"{there.said}: has no {name}, which is in {here.said} ({len(missing)} such); a "
                "merge needs models with the same tensors, or skip=[<pattern>] for those that "
                "stay as the base has them"
            )
    for name, shape in ours.items():
        if theirs[name] != shape:
            raise UsageError(
                f"{model.said}: {name} is {list(theirs[name])}, and {list(shape)} in "
                f"{base.said}; only models of one shape can be merged, but skip=[<pattern>] keeps "
                "such tensors as the base has them"
            )


def index_of(files: Mapping[str, Sequence[Entry]]) -> bytes:
    """The index of several files, as ``from_pretrained`` reads it."""
    total = sum(e.nbytes for entries in files.values() for e in entries)
    where = {e.name: name for name, entries in files.items() for e in entries}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1).encode()
