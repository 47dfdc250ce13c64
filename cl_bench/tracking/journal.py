"""``results.jsonl``: an event a line, on disk at once, each line sealed to those before it.

Every line ends with ``"chain"``: the first 16 hexadecimal digits of the SHA-256 of the chain before
it and of the line without its own. A line that was changed, doubled or taken out breaks the chain
where it stands. Lines of older versions have none; those that follow them cover them.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_bench.contracts import UsageError
from cl_bench.tracking.files import (
    NO_LINKS,
    PUT_BACK,
    RESULTS,
    explained,
    read_required,
    to_json,
    write,
)

SEAL = re.compile(rb', "chain": "([0-9a-f]{16})"\}\Z')


@dataclass(frozen=True)
class Line:
    """One event of a journal.

    Attributes:
        event: what happened, without the chain.
        end: bytes of the file up to and with this line.
        chain: that covers all lines up to this one.
    """

    event: dict[str, Any]
    end: int
    chain: str


def read_journal(directory: Path) -> list[Line]:
    """The whole lines of a run's ``results.jsonl``; half a last line, as a kill leaves it, is none.

    Raises:
        UsageError: there is no such file, or a line is not what the run wrote; says which.
    """
    path = directory / RESULTS
    content = read_required(path)
    lines: list[Line] = []
    chain, end, sealed = "", 0, False
    # What follows the last newline was never completed.
    for number, raw in enumerate(content.split(b"\n")[:-1], start=1):
        end += len(raw) + 1
        event = _parsed(path, number, raw)
        seal = SEAL.search(raw)
        body = raw if seal is None else raw[: seal.start()] + b"}"
        chain = _next(chain, body)
        # A seal that is missing where the line before has one was cut off.
        if (seal[1].decode() != chain) if seal else (sealed or "chain" in event):
            raise UsageError(_broken(path, number, doubled=number > 1 and _again(raw, content)))
        sealed = seal is not None
        event.pop("chain", None)
        lines.append(Line(event, end, chain))
    return lines


class Journal:
    """The open end of a run's ``results.jsonl``.

    Args:
        directory: of the run.
        lines: that are there already, as :func:`read_journal` gives them.

    Raises:
        UsageError: the disk refuses.
    """

    def __init__(self, directory: Path, lines: list[Line]) -> None:
        self.path = directory / RESULTS
        self.chain = lines[-1].chain if lines else ""
        self._kept = lines[-1].end if lines else 0
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | NO_LINKS
        with explained(self.path):
            self._descriptor = os.open(self.path, flags, 0o666)

    @property
    def position(self) -> int:
        """Bytes so far."""
        return os.lseek(self._descriptor, 0, os.SEEK_END)

    def append(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Write an event, wait until it is on disk, and return it as a reader gets it."""
        body = to_json(event).encode()
        chain = _next(self.chain, body)
        sealed = body[:-1] + f', "chain": "{chain}"}}\n'.encode()
        with explained(self.path):
            end = self.position
            try:
                write(self._descriptor, sealed)
                os.fsync(self._descriptor)
            except OSError:
                # Half a line must not stand before the next one.
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, end)
                raise
        self.chain = chain
        written: dict[str, Any] = json.loads(body)
        return written

    def cut(self) -> None:
        """Drop what stands after the lines that it was made with."""
        with explained(self.path):
            os.ftruncate(self._descriptor, self._kept)
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Let go of the file; a second time does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def check_events(directory: Path, lines: list[Line], task_names: list[str] | None = None) -> None:
    """Make sure that events tell of tasks and rows that the run has.

    Args:
        directory: of the run, for the message.
        lines: of its journal.
        task_names: of its stream; None takes those that the matrix has.

    Raises:
        UsageError: one does not; says which line.
    """
    for number, line in enumerate(lines, start=1):
        for problem in _problems(line.event, task_names):
            raise UsageError(f"{directory / RESULTS}, line {number}: {problem}; {PUT_BACK}")


def _problems(event: Mapping[str, Any], names: list[str] | None) -> Iterator[str]:
    kind = event.get("event")
    if not isinstance(kind, str):
        yield "it names no event"
    elif kind == "evaluation":
        row, scores = event.get("row"), event.get("scores")
        if not isinstance(row, int) or row < 0 or (names is not None and row > len(names)):
            yield f"row {row!r} is none of this run's"
        elif not isinstance(scores, Mapping):
            yield "an evaluation without scores"
        else:
            for name, score in scores.items():
                if names is not None and name not in names:
                    yield f"the task {name!r} is none of this run's"
                elif score is not None and not isinstance(score, int | float):
                    yield f"the score {score!r} of {name!r} is no number"
    elif kind == "layers" and not isinstance(event.get("layers"), Mapping):
        yield "an event of layers without any"
    elif kind == "status" and not isinstance(event.get("status"), str):
        yield "a status that does not say which"


def _parsed(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    try:
        event = json.loads(raw.decode())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        what = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON"
        raise UsageError(f"{path}, line {number}: {what} ({error}); {PUT_BACK}") from None
    if not isinstance(event, dict):
        raise UsageError(f"{path}, line {number}: it holds no event; {PUT_BACK}")
    return event


def _again(raw: bytes, content: bytes) -> bool:
    return content.count(raw + b"\n") > 1


def _broken(path: Path, number: int, doubled: bool) -> str:
    what = (
        "it stands there twice"
        if doubled
        else f"it is not what the run wrote{f' after line {number - 1}' if number > 1 else ''} (it "
        "was changed, or lines before it were taken out or put in)"
    )
    return f"{path}, line {number}: {what}; {PUT_BACK}"


def _next(chain: str, body: bytes) -> str:
    return hashlib.sha256(chain.encode() + body).hexdigest()[:16]
