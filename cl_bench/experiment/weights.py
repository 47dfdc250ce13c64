"""Weights of the network after every task, for those who take them elsewhere.

One safetensors file for each number of tasks learned: nothing but the learner's ``state_dict``. A
run is never resumed from them; :mod:`cl_bench.experiment.checkpoint` has what that takes.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cl_bench.contracts import UsageError
from cl_bench.tracking.files import delete, make_directory, write_atomically

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

    def save(self, learned: int, weights: Mapping[str, Tensor]) -> None:
        """Write the weights after ``learned`` tasks.

        Raises:
            UsageError: the disk takes no more; the files before stay.
        """
        make_directory(self.directory)
        write_atomically(self.path(learned), encoded(weights))

    def forget_after(self, learned: int) -> None:
        """Delete those of more than ``learned`` tasks, and what was never finished."""
        for stray in self.directory.glob(".task*.tmp"):
            delete(stray)
        for other in self.kept():
            if other > learned:
                delete(self.path(other))


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


def read_weights(path: Path) -> dict[str, Tensor]:
    """What :func:`encoded` wrote.

    Raises:
        UsageError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            shared = json.loads((file.metadata() or {}).get(SHARED, "{}"))
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from None
    return {**found, **{name: found[owner] for name, owner in shared.items()}}


def damaged(path: Path, error: Exception) -> UsageError:
    """What to say about weights that cannot be read."""
    return UsageError(f"{path} is damaged ({error}): export another task, or reproduce the run")
