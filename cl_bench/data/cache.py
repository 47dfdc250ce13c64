"""Tensors that are slow to make, kept in ``$CL_BENCH_CACHE`` (default ``~/.cache/cl_bench``)."""

import contextlib
import hashlib
import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def cache_directory() -> Path:
    """``$CL_BENCH_CACHE``, or ``~/.cache/cl_bench``; it need not exist yet."""
    return Path(os.environ.get("CL_BENCH_CACHE") or "~/.cache/cl_bench").expanduser()


def digest(tensors: dict[str, Tensor]) -> str:
    """Sha256 (hex) over names, types, shapes and contents; equal on every machine."""
    result = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        result.update(tensor.contiguous().numpy())
    return result.hexdigest()


def cached(identity: str, build: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], str]:
    """``build()`` and its :func:`digest`, from the cache if an earlier call left them there.

    The digest is stored beside the tensors and compared on reading, so a file that was cut short
    or altered is noticed and made anew. A cache that cannot be written only costs time.

    Args:
        identity: hash of everything that ``build`` depends on; names the file.
        build: makes the tensors; must be a pure function of what ``identity`` covers.
    """
    path = cache_directory() / f"{identity}.safetensors"
    found = _read(path)
    if found is not None:
        return found
    tensors = build()
    fingerprint = digest(tensors)
    _write(path, tensors, fingerprint)
    return tensors, fingerprint


def present(identity: str) -> tuple[dict[str, Tensor], str] | None:
    """What :func:`cached` would find: tensors and digest; None, said where a file is damaged."""
    return _read(cache_directory() / f"{identity}.safetensors")


@contextlib.contextmanager
def alone(name: str, otherwise: str) -> Iterator[None]:
    """Nobody else makes the same thing meanwhile; where no lock can be had, a warning.

    Args:
        name: of the thing.
        otherwise: what runs at the same time do without a lock.
    """
    lock = FileLock(cache_directory() / f"{name}.lock")
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        warnings.warn(
            f"cannot lock {lock.lock_file} ({error}); runs at the same time {otherwise}: set "
            "CL_BENCH_CACHE to a writable folder",
            stacklevel=3,
        )
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _read(path: Path) -> tuple[dict[str, Tensor], str] | None:
    try:
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            expected = (file.metadata() or {}).get("sha256")
        if digest(tensors) == expected:
            return tensors, expected
        reason = "its content does not match its checksum"
    except (OSError, SafetensorError) as error:
        reason = str(error)
    warnings.warn(f"cache file {path} is damaged and is made anew: {reason}", stacklevel=4)
    return None


def _write(path: Path, tensors: dict[str, Tensor], fingerprint: str) -> None:
    # A name of its own per writer, then one atomic rename: concurrent runs never see half a file.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"sha256": fingerprint})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"cannot write the cache {path.parent} ({error}); what it would hold is made "
            "again at every start: set CL_BENCH_CACHE to a writable folder",
            stacklevel=4,
        )
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)
