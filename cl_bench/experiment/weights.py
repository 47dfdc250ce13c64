"""Weights of the network after every task, for those who take them elsewhere.

One safetensors file for each number of tasks learned: nothing but the learner's ``state_dict``. A
run is never resumed from them; :mod:`cl_bench.experiment.checkpoint` has what that takes.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cl_bench.contracts import UsageError
from cl_bench.tracking.aside import Aside
from cl_bench.tracking.files import delete, make_directory, open_file, write_atomically

SHARED = "shared"
"""Metadata: names whose tensor is another's, as JSON; safetensors holds no tensor twice."""


class TaskWeights:
    """The weights that one run keeps.

    Args:
        directory: of the run; files go to ``weights`` in it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "weights"

    def path(self, learned: int) -> Path:
        """The file for ``learned`` tasks, the row of the accuracy matrix."""
        return self.directory / f"task{learned:04}.safetensors"

    def kept(self) -> list[int]:
        """Rows whose weights are there."""
        return sorted(int(p.stem.removeprefix("task")) for p in self.directory.glob("task*.safe*"))

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(self.path(learned).stat().st_size for learned in self.kept())

    def save(self, learned: int, weights: Mapping[str, Tensor]) -> bytes:
        """Write the weights after ``learned`` tasks, and return what the file holds.

        Raises:
            UsageError: the disk takes no more; the files before stay.
        """
        make_directory(self.directory)
        content = encoded(weights)
        write_atomically(self.path(learned), content)
        return content

    def set_aside_after(self, learned: int, aside: Aside) -> None:
        """Move those of more than ``learned`` tasks; what was never finished is deleted."""
        for stray in self.directory.glob(".task*.tmp"):
            delete(stray)
        for other in self.kept():
            if other > learned:
                aside.take(self.path(other))


def encoded(weights: Mapping[str, Tensor], **metadata: str) -> bytes:
    """Weights as the content of a safetensors file."""
    owners: dict[tuple[object, ...], str] = {}
    shared: dict[str, str] = {}
    for name, tensor in weights.items():
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        owner = owners.setdefault(memory, name) if tensor.numel() else name
        if owner != name:
            shared[name] = owner
    storages: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name in shared:
            continue
        storage = tensor.untyped_storage().data_ptr()
        kept = tensor.detach().cpu().contiguous()
        # A part of another tensor is stored again: safetensors takes none that overlap.
        own[name] = kept.clone() if storage in storages else kept
        storages.add(storage)
    return save(own, {SHARED: json.dumps(shared), **metadata})


def read_weights(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """What :func:`encoded` wrote.

    Args:
        path: of the file.
        sha256: of its content, where the record tells.

    Raises:
        UsageError: the file is damaged, or cannot be read.
    """
    try:
        with open_file(path) as file:
            content = file.read()
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror or error})") from None
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise damaged(path, "its contents have changed since the run wrote it")
    try:
        found = load(content)
        # Behind the length of the header, 8 bytes.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        shared = json.loads(header.get("__metadata__", {}).get(SHARED, "{}"))
    except (SafetensorError, ValueError) as error:
        raise damaged(path, error) from None
    return {**found, **{name: found[owner] for name, owner in shared.items()}}


def damaged(path: Path, reason: object) -> UsageError:
    """What to say about weights that cannot be used."""
    return UsageError(f"{path} is damaged ({reason}): export another task, or reproduce the run")
