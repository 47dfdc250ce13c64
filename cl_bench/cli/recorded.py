"""A run that is there already, as its own files tell it."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cl_bench.errors import UsageError

OBJECT = "object"
"""Key of a configuration node that stands for an object which Python code handed over."""


@dataclass(frozen=True)
class Recorded:
    """What a run began with.

    Attributes:
        directory: of the run.
        cfg: its resolved configuration.
        choices: which option of each configuration group was chosen.
        environment: versions, threads, the directory that relative paths begin in.
        command: the command line.
    """

    directory: Path
    cfg: DictConfig
    choices: dict[str, Any]
    environment: dict[str, Any]
    command: str

    def require_names(self, word: str, remedy: str) -> None:
        """Raise :class:`UsageError` if Python code handed over objects that only it can make."""
        objects = [str(k) for k, v in self.cfg.items() if isinstance(v, DictConfig) and OBJECT in v]
        if objects:
            raise UsageError(
                f"{word}={self.directory}: its {' and '.join(objects)} came from Python code as "
                f"objects, which the record cannot make again; {remedy}"
            )

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        """Inside, threads and working directory are those of the run, as far as they are there.

        Sums are rounded in another order with another number of threads; relative paths, of data or
        of the user's own modules, begin where the run did.
        """
        import torch

        there = str(self.environment.get("directory") or os.getcwd())
        with contextlib.ExitStack() as stack:
            threads = torch.get_num_threads()
            stack.callback(torch.set_num_threads, threads)
            torch.set_num_threads(int(self.environment.get("threads", threads)))
            if Path(there).resolve() != Path.cwd().resolve():
                if not Path(there).is_dir():
                    print(
                        f"{there}, where the run began, is not there: relative paths begin here",
                        file=sys.stderr,
                    )
                else:
                    stack.enter_context(contextlib.chdir(there))
                    sys.path.append(there)  # as python -m has it
                    stack.callback(sys.path.remove, there)
            yield


def read_recorded(word: str, directory: Path, whole: bool = True) -> Recorded:
    """The run that ``word=directory`` names.

    Args:
        word: of the command line.
        directory: of the run.
        whole: whether all its files have to be as the run wrote them, not those read here alone.

    Raises:
        UsageError: there is none, or a file of it is damaged; says which.
    """
    from cl_bench.tracking.files import (
        CHOICES,
        COMMAND,
        CONFIG,
        ENVIRONMENT,
        PUT_BACK,
        RESULTS,
        read_json,
        read_text,
    )
    from cl_bench.tracking.reading import read_config
    from cl_bench.tracking.verify import verified

    if not (directory / CONFIG).is_file():
        raise UsageError(
            f"{word}={directory}: that directory holds no run ({CONFIG} is missing); give the "
            "directory that the run named in its first line"
        )
    if whole and (directory / RESULTS).exists():
        verified(directory)
    cfg = read_config(directory)
    if not {"strategy", "stream"} <= set(cfg):
        raise UsageError(f"{directory / CONFIG} holds no configuration of a run; {PUT_BACK}")
    found: dict[str, dict[str, Any]] = {CHOICES: {}, ENVIRONMENT: {}}
    for name in found:
        if (directory / name).exists():
            found[name] = read_json(directory / name)
    command = read_text(directory / COMMAND).strip()
    return Recorded(directory, cfg, found[CHOICES], found[ENVIRONMENT], command)


def named(arguments: list[str], word: str) -> tuple[Path, list[str]]:
    """The directory of ``word=<run directory>``, and the other arguments.

    Raises:
        UsageError: there are two.
    """
    first, *more = [a for a in arguments if a.startswith(f"{word}=")]
    if more:
        raise UsageError(f"{word}=... stands there twice: {first} {' '.join(more)}")
    return Path(first.removeprefix(f"{word}=")), [a for a in arguments if a != first]
