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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
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
    check_events(directory, lines)
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
        return
    for key, (says, fits) in FIELDS.get(kind, {}).items():
        if not fits(event.get(key)):
            yield f"{key} of the {kind} event is {str(event.get(key))[:100]!r}, not {says}"
            return
    if kind == "evaluation" and names is not None:
        details = event.get("details") or {}
        if event["row"] > len(names):
            yield f"row {event['row']!r} is none of this run's"
        for name in [n for n in (*event["scores"], *details) if n not in names]:
            yield f"the task {name!r} is none of this run's"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def is_number(value: Any) -> bool:
    """Whether a value of a record is a number or None.

    JSON has integers of any size, and floats take not all of them.
    """
    return value is None or type(value) is float or (type(value) is int and abs(value) < 2**63)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(is_number, value.values()))


def _are_groups(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(v, Mapping) for v in value.values())


def _are_digests(value: Any) -> bool:
    plain = isinstance(value, Mapping) and all(
        isinstance(digest, str) and re.fullmatch(r"\w+\.\w+", name)
        for name, digest in value.items()
    )
    return value is None or plain


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_weights_file(value: Any) -> bool:
    return _is_text(value) and re.fullmatch(r"weights/task\d+\.safetensors", value) is not None


Field = tuple[str, Callable[[Any], bool]]

FIELDS: dict[str, dict[str, Field]] = {
    "status": {
        "status": ("the name of a status", _is_text),
        "files": ("a SHA-256 for each file of the run", _are_digests),
        "seed": ("a whole number", lambda value: value is None or type(value) is int),
    },
    "evaluation": {
        "row": ("a row of the matrix", _is_count),
        "scores": ("a number for each task", _are_numbers),
        "details": (
            "numbers for each task",
            lambda value: (
                value is None or (_are_groups(value) and all(map(_are_numbers, value.values())))
            ),
        ),
    },
    "layers": {
        "task": ("the index of a task", _is_count),
        "layers": ("numbers for each layer", _are_groups),
    },
    "weights": {
        "learned": ("a number of tasks", _is_count),
        "file": ("a file in weights/", _is_weights_file),
        "bytes": ("a size", _is_count),
        "sha256": ("a SHA-256", _is_text),
    },
    "probe": {
        "probe": ("the name of a probe", _is_text),
        "task": ("the index of a task", _is_count),
        "values": ("numbers by task", lambda value: isinstance(value, Mapping)),
    },
}
"""What readers of a run take for granted, by event: a record may be a stranger's."""


def _parsed(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    try:
        event = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:  # not JSON alone: whole numbers have a limit
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


def now() -> str:
    """The time in UTC, to a millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
