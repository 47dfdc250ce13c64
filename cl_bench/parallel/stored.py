"""Tensors that processes share out, in a folder of files: each process writes and reads its rows.

``torch.distributed.checkpoint`` does both, in safetensors files, in which nothing can run. Another
number of processes may read them, or one.
"""

import hashlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, empty

from cl_bench.contracts import UsageError
from cl_bench.parallel.ranks import decided, gathered, rank
from cl_bench.subspace import Owned

NAME = "stored as"
"""Key of a :class:`Stored` in plain values."""


@dataclass(frozen=True)
class Stored:
    """A tensor whose rows lie in the files of a folder.

    Attributes:
        folder: of the files.
        name: of the tensor in them.
        shape: of the whole.
        dtype: of its numbers.
        dim: along which processes share it out.
    """

    folder: Path
    name: str
    shape: torch.Size
    dtype: torch.dtype
    dim: int

    @property
    def nbytes(self) -> int:
        """Of the whole."""
        return self.shape.numel() * self.dtype.itemsize

    def plain(self) -> dict[str, Any]:
        """In values that every file can hold."""
        return {
            NAME: self.name,
            "folder": self.folder.name,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "dim": self.dim,
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any], beside: Path) -> "Stored":
        """Inverse of :meth:`plain`; the folder lies in ``beside``."""
        dtype = getattr(torch, plain["dtype"])
        folder = beside / Path(plain["folder"]).name
        return cls(folder, plain[NAME], torch.Size(plain["shape"]), dtype, plain["dim"])

    def place(self, mesh: DeviceMesh | None) -> Tensor:
        """An empty tensor for it: this process's rows, or the whole where there is no mesh."""
        if mesh is None:
            return torch.empty(self.shape, dtype=self.dtype)
        return empty(self.shape, dtype=self.dtype, device_mesh=mesh, placements=[Shard(self.dim)])


def leaf_by_leaf(value: Any, make: Callable[[Any, str], Any], where: str = "") -> Any:
    """A nested value with ``make(leaf, path)`` in place of every leaf."""
    if isinstance(value, Mapping):
        found = {
            k: leaf_by_leaf(v, make, f"{where}.{k}" if where else str(k)) for k, v in value.items()
        }
        return Owned(found) if isinstance(value, Owned) else found
    if isinstance(value, list | tuple):
        return type(value)(leaf_by_leaf(v, make, f"{where}.{i}") for i, v in enumerate(value))
    return make(value, where)


def taken_out(value: Any, folder: Path) -> tuple[Any, dict[str, DTensor]]:
    """A nested value with a :class:`Stored` for every tensor that is shared out; and these.

    One that stands there under several names is among them once. All processes must ask.
    """
    found: dict[str, DTensor] = {}

    def note(leaf: Any, where: str) -> None:
        if isinstance(leaf, DTensor):
            found[where] = leaf

    leaf_by_leaf(value, note)
    first = decided(lambda: _first_names(found)) if found else {}

    def take(leaf: Any, where: str) -> Any:
        if where not in found:
            return leaf
        (placement,) = leaf.placements
        assert isinstance(placement, Shard)
        return Stored(folder, first[where], leaf.shape, leaf.dtype, placement.dim)

    return leaf_by_leaf(value, take), {name: found[name] for name in first.values()}


def _first_names(tensors: Mapping[str, DTensor]) -> dict[str, str]:
    """The first name of the same memory; process 0 has rows of every tensor that has any."""
    known: dict[Any, str] = {}
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        rows = tensor.to_local()
        where = (rows.data_ptr(), tensor.shape, rows.stride(), tensor.dtype)
        found[name] = known.setdefault(where, name) if rows.numel() else name
    return found


def found_rows(value: Any, beside: Path) -> Any:
    """A nested value with every :class:`Stored`, which is plain in it, as such."""
    if isinstance(value, Mapping):
        if NAME in value:
            return Stored.of(value, beside)
        return {k: found_rows(v, beside) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(found_rows(v, beside) for v in value)
    return value


def resolved(value: Any, mesh: DeviceMesh | None = None) -> Any:
    """A nested value with every :class:`Stored` read: own rows, or all without a mesh."""
    places: list[tuple[Stored, Tensor]] = []

    def take(leaf: Any, where: str) -> Any:
        if not isinstance(leaf, Stored):
            return leaf
        places.append((leaf, leaf.place(mesh)))
        return places[-1][1]

    found = leaf_by_leaf(value, take)
    read(places)
    return found


def read(places: Iterable[tuple[Stored, Tensor]]) -> None:
    """Fill tensors, whole or shared out, with what is stored for each of them."""
    by_folder: dict[Path, dict[str, list[Tensor]]] = {}
    for stored, place in places:
        by_folder.setdefault(stored.folder, {}).setdefault(stored.name, []).append(place)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as one process reads
        for folder, wanted in by_folder.items():
            files: Any = dcp.HuggingFaceStorageReader  # type: ignore[attr-defined]
            firsts = {name: tensors[0] for name, tensors in wanted.items()}
            load(firsts, storage_reader=files(str(folder)), no_dist=True)  # each what it needs
    for first, *others in (tensors for w in by_folder.values() for tensors in w.values()):
        for other in others:
            other.copy_(first)


def write(folder: Path, tensors: Mapping[str, DTensor]) -> dict[str, str]:
    """Write tensors; all processes together, each its own rows. The folder is whole or not there.

    Returns:
        SHA-256 of every file, by name.

    Raises:
        UsageError: a process cannot write, or process 0 does not see what another has written.
    """
    scratch = folder.with_name(f".{folder.name}.tmp")
    if rank() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
    gathered(None)  # nobody writes into what is deleted
    files: Any = dcp.HuggingFaceStorageWriter  # type: ignore[attr-defined]
    try:
        save(dict(tensors), storage_writer=files(str(scratch), save_distributed=True))
    except CheckpointException as failed:
        which, (error, _) = next(iter(failed.failures.items()))
        raise UsageError(
            f"process {which} cannot write {folder} ({error}): free some space, or give "
            "run_dir=... on a disk that all processes may write to; what was saved before is whole"
        ) from failed
    own = scratch.glob(f"shard-{rank() + 1:05}-*") if scratch.exists() else ()
    hashes = {
        name: sha
        for told in gathered({p.name: sha256(p) for p in own})
        for name, sha in told.items()
    }
    unseen = decided(lambda: [name for name in hashes if not (scratch / name).is_file()])
    if unseen:
        raise UsageError(
            f"process 0 does not see {scratch / unseen[0]}, which another process has written: "
            "give run_dir=... on a disk that all hosts share"
        )
    if rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before its index
        scratch.rename(folder)
        _sync(folder.parent)
    return hashes


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_files() -> None:
    """Raise :class:`UsageError` if this version of torch cannot write such files."""
    writer = getattr(dcp, "HuggingFaceStorageWriter", None)
    if writer is None or "save_distributed" not in signature(writer).parameters:
        raise UsageError(
            f"trainer=fsdp writes checkpoints with torch.distributed.checkpoint, whose safetensors "
            f"files torch {torch.__version__} does not know: install a newer torch, or use "
            "checkpoint.enabled=false"
        )


def _sync(directory: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
