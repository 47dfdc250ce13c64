"""A run that is there already, as its own files tell it."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cl_bench.cli.trust import Trust, require_trusted
from cl_bench.errors import UsageError, printable

OBJECT = "object"
"""Key of a configuration node that stands for an object which Python code handed over."""

MOST_THREADS = 4096
"""More than that is no number of threads that torch ran with."""


@dataclass(frozen=True)
class Recorded:
    """What a run began with.

    Attributes:
        directory: of the run.
        cfg: its resolved configuration.
        choices: which option of each configuration group was chosen.
        environment: versions, threads, the directory that relative paths begin in.
        command: the command line.
        trust: what this command line vouches for.
    """

    directory: Path
    cfg: DictConfig
    choices: dict[str, Any]
    environment: dict[str, Any]
    command: str
    trust: Trust

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

        Sums are rounded in another order with another number of threads; relative paths of data
        begin where the run did. Code is not looked for there, but where ``trust=`` says.
        """
        import torch

        there = str(self.environment.get("directory") or os.getcwd())
        self._require_own_server(Path(there))
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.trust.importable())
            stack.enter_context(_without_pickles(self.trust))
            threads = torch.get_num_threads()
            stack.callback(torch.set_num_threads, threads)
            torch.set_num_threads(self._threads(threads))
            if Path(there).resolve() != Path.cwd().resolve():
                if not Path(there).is_dir():
                    print(
                        f"{printable(there)}, where the run began, is not there: relative paths "
                        "begin here",
                        file=sys.stderr,
                    )
                else:
                    stack.enter_context(contextlib.chdir(there))
            yield

    def _require_own_server(self, there: Path) -> None:
        """Raise :class:`UsageError` if the record's folders would choose who gets the W&B key."""
        folders = [self.directory, *([there] if there.resolve() != Path.cwd().resolve() else [])]
        for settings in (folder / "wandb" / "settings" for folder in folders):
            if OmegaConf.select(self.cfg, "logger.mode") == "online" and settings.exists():
                raise UsageError(
                    f"logger.mode=online: {settings} would choose the server that your W&B key is "
                    "sent to; delete that file if it is not yours, and set WANDB_BASE_URL if it is"
                )

    def _threads(self, default: int) -> int:
        threads = self.environment.get("threads", default)
        if not isinstance(threads, int) or not 0 < threads <= MOST_THREADS:
            raise UsageError(
                f"{self.directory / 'environment.json'} is damaged: threads={threads} is no number "
                f"from 1 to {MOST_THREADS}"
            )
        return threads


@contextlib.contextmanager
def _without_pickles(trust: Trust) -> Iterator[None]:
    """Inside, nobody's ``torch.load`` takes a pickle that could run code, unless code is trusted.

    A network of an installed package may load a file whose name the record gives.
    """
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    if trust != Trust() or name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


def read_recorded(word: str, directory: Path, trust: Trust, whole: bool = True) -> Recorded:
    """The run that ``word=directory`` names; nothing of it has been run or evaluated.

    Args:
        word: how it was named on the command line.
        directory: of the run.
        trust: whose code, beside installed packages', the configuration may name.
        whole: whether all its files have to be as the run wrote them, not those read here alone.

    Raises:
        UsageError: there is none, a file of it is damaged, or it names other code; says which.
    """
    from cl_bench.report.escape import shown
    from cl_bench.tracking.files import (
        CHOICES,
        COMMAND,
        CONFIG,
        ENVIRONMENT,
        RESULTS,
        read_json,
        read_text,
    )
    from cl_bench.tracking.files import require_plain as require_plain_files
    from cl_bench.tracking.reading import read_config
    from cl_bench.tracking.verify import verified

    if not (directory / CONFIG).exists():
        raise UsageError(
            f"{word}={directory}: that directory holds no run ({CONFIG} is missing); give the "
            "directory that the run named in its first line"
        )
    require_plain_files(directory)
    config = read_config(directory)
    _require_values(config, directory / CONFIG)
    require_trusted(config, directory, word, trust)
    if whole and (directory / RESULTS).exists():
        verified(directory)
    choices = shown(read_json(directory / CHOICES) or {})
    environment = read_json(directory / ENVIRONMENT) or {}
    command = printable(read_text(directory / COMMAND).strip())
    return Recorded(directory, OmegaConf.create(config), choices, environment, command, trust)


def _require_values(node: Any, where: Path, key: str = "") -> None:
    """Raise :class:`UsageError` if a record holds expressions, such as ``${oc.env:HOME}``.

    They were evaluated before it was written: evaluated again, they would tell whoever wrote them
    what the environment here holds.
    """
    if isinstance(node, dict):
        for name, inner in node.items():
            _require_values(inner, where, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for i, inner in enumerate(node):
            _require_values(inner, where, f"{key}.{i}")
    elif isinstance(node, str) and "${" in node:
        raise UsageError(
            f"{where}: {key}={node} is an expression, and a record holds values alone: it is not "
            "evaluated; write the value in its place"
        )


def named(arguments: list[str], word: str) -> tuple[Path, list[str]]:
    """The directory of ``word=<run directory>``, and the other arguments.

    Raises:
        UsageError: there is none, or there are two.
    """
    first, *more = [a for a in arguments if a.startswith(f"{word}=")] or [f"{word}="]
    if first == f"{word}=":
        raise UsageError(f"{first}: names no run; give its directory, {word}=runs/...")
    if more:
        raise UsageError(f"{word}=... stands there twice: {first} {' '.join(more)}")
    return Path(first.removeprefix(f"{word}=")), [a for a in arguments if a != first]
