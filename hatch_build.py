"""A build refuses a tree whose link ``cl_bench/tasks`` an archive has lost."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class LinkIsThere(BuildHookInterface):
    """Some archives and systems write a link as a file that holds its target."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Raise ``ValueError`` where ``cl_bench/tasks`` is no folder."""
        tasks = Path(self.root) / "cl_bench" / "tasks"
        if not tasks.is_dir():
            raise ValueError(
                f"{tasks} is no folder: this copy has lost the link to ../tasks; install from a "
                "git checkout with links (git config core.symlinks true), a tar.gz or a wheel"
            )
