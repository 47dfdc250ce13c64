"""The folder for files that a run no longer uses: beside the others, never deleted."""

import shutil
import time
from pathlib import Path

from cl_bench.tracking.files import explained, make_directory

SUPERSEDED = "superseded"
"""Folder in a run's directory; each time that something is put there makes a folder of its own."""


class Aside:
    """Takes files of one run out of its way. Makes its folder with the first one.

    Args:
        directory: of the run.

    Attributes:
        folder: where they go, ``superseded/<time>`` in the run's directory.
        moved: names that went there, relative to the run's directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.folder = directory / SUPERSEDED / time.strftime("%Y%m%d-%H%M%S")
        self.moved: list[str] = []

    def take(self, path: Path) -> None:
        """Move a file, folder or link of the run, if it is there.

        Raises:
            UsageError: the disk refuses; what was moved before stays moved.
        """
        if not path.exists() and not path.is_symlink():
            return
        name = path.relative_to(self.directory)
        target = self.folder / name
        for attempt in range(2, 1000):  # two within one second
            if not target.exists():
                break
            target = self.folder / name.with_name(f"{name.name}-{attempt}")
        make_directory(target.parent)
        with explained(target):
            shutil.move(path, target)
        self.moved.append(str(name))
