"""The environment of a run: versions, platform, and the state of the code."""

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

from cl_bench.version import VERSION

PACKAGES = (
    "torch",
    "lightning",
    "hydra-core",
    "omegaconf",
    "numpy",
    "datasets",
    "scikit-learn",
    "wandb",
    "pandas",
    "pillow",
)
"""Whose versions stand in ``environment.json``, beside our own."""


def describe_environment() -> dict[str, Any]:
    """Python, platform, package versions, and the git commit of the current directory."""
    versions: dict[str, str | None] = {"cl_bench": VERSION}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    commit = _git("rev-parse", "HEAD")
    changes = _git(*_no_filters(), "status", "--porcelain", "--ignore-submodules=dirty")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": versions,
        # Files that git does not know count as changes: they may hold the strategy that ran.
        "git": {"commit": commit, "dirty": None if changes is None else bool(changes)},
    }


def _no_filters() -> list[str]:
    """Options under which git starts no program that the repository's own configuration names.

    A run that is resumed begins where its record says, which may be somebody else's repository.
    """
    keys = _git("config", "--name-only", "--get-regexp", r"^filter\.") or ""
    drivers = dict.fromkeys(key.rpartition(".")[0] for key in keys.splitlines())
    off = [f"{driver}.{step}=" for driver in drivers for step in ("clean", "smudge", "process")]
    off += [f"{driver}.required=false" for driver in drivers]
    return [word for setting in ("core.fsmonitor=false", *off) for word in ("-c", setting)]


def _git(*arguments: str) -> str | None:
    """What git says about the current directory; None without git or without a repository."""
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
