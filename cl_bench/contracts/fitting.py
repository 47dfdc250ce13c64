"""Whether a value is what an annotation asks for, and what to say if not."""

import collections.abc
import inspect
import math
import numbers
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from cl_bench.contracts.options import Length, Range, shown

PLAIN = (bool, int, float, str, list, tuple, dict, types.NoneType)
"""What a configuration holds."""


class MisfitError(Exception):
    """A value is not what the annotation asks for.

    Args:
        remedy: what it should be.
        kind: whether the kind is right, and only the value is wrong.
    """

    def __init__(self, remedy: str, kind: bool = False) -> None:
        super().__init__(remedy)
        self.remedy, self.kind = remedy, kind


def fit(hint: Any, value: Any) -> Any:
    """The value as the annotation takes it.

    Raises:
        MisfitError: it is not what the annotation asks for.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _in_ranges(fit(inner[0], value), inner[1:])
    if origin in (Union, types.UnionType):
        return _one_of(inner, value)
    if origin is Literal:
        return _literal(inner, value)
    if hint is bool:
        return _plain(value, isinstance(value, bool), "use true or false")
    if hint is int:
        return _plain(value, _is_number(value, numbers.Integral), "must be a whole number")
    if hint is float:
        number = _is_number(value, numbers.Real)
        if number and not math.isfinite(value):
            raise MisfitError("must be a finite number", kind=True)
        return _plain(value, number, "must be a number")
    if hint is str:
        return _plain(value, isinstance(value, str), "must be text")
    if hint is types.NoneType:
        return _plain(value, value is None, "must be null")
    if inspect.isclass(hint) and is_dataclass(hint):
        return _plain(
            value, isinstance(value, hint), f"its options stand below it ({_fields(hint)})"
        )
    if origin is tuple and Ellipsis not in inner:
        return _tuple(inner, value)
    if origin in (list, tuple, collections.abc.Sequence, collections.abc.Iterable):
        return _list(inner[0], value)
    if origin in (dict, collections.abc.Mapping):
        return _mapping(inner, value)
    return value


def _fields(kind: Any) -> str:
    return ", ".join(inspect.signature(kind).parameters)


def _plain(value: Any, right: bool, remedy: str) -> Any:
    if not right:
        raise MisfitError(remedy)
    return value


def _is_number(value: Any, kind: type) -> bool:
    # numpy's booleans are no numbers of Python's, bool is.
    return isinstance(value, kind) and not isinstance(value, bool)


def _in_ranges(value: Any, markers: Sequence[Any]) -> Any:
    for marker in markers:
        if isinstance(marker, Length) and not value and isinstance(value, str):
            raise MisfitError("must not be empty", kind=True)
        if isinstance(marker, Length) and len(value) < marker.least:
            raise MisfitError(f"name at least {marker.least}", kind=True)
        if isinstance(marker, Range):
            for entry in value if isinstance(value, list | tuple) else [value]:
                if _is_number(entry, numbers.Real) and entry not in marker:
                    raise MisfitError(str(marker), kind=True)
    return value


def _literal(allowed: Sequence[Any], value: Any) -> Any:
    for choice in allowed:
        if value == choice and type(value) is type(choice):
            return value
    if isinstance(value, bool) and shown(value) in allowed:
        return shown(value)  # YAML reads the word as a boolean
    *others, last = dict.fromkeys(map(word, allowed))
    remedy = f"use {', '.join(others)} or {last}" if others else f"use {last}"
    raise MisfitError(remedy, kind=isinstance(value, str))


def _one_of(members: Sequence[Any], value: Any) -> Any:
    words = tuple(w for m in members if get_origin(m) is Literal for w in get_args(m))
    members = [m for m in members if get_origin(m) is not Literal]
    if words:
        members.append(Literal[words])
    failed = []
    for member in members:
        if _opaque(member) and isinstance(value, PLAIN):
            continue
        try:
            return fit(member, value)
        except MisfitError as wrong:
            failed.append(wrong)
    plain = [m for m in members if not _opaque(m)]
    alone = len([m for m in plain if m is not types.NoneType]) == 1
    near = [wrong.remedy for wrong in failed if wrong.kind and (alone or not words)]
    if near:
        raise MisfitError(near[0] + ", or null" * (types.NoneType in members), kind=True)
    *others, last = dict.fromkeys(map(_kind, plain))
    raise MisfitError(f"must be {', '.join(others)} or {last}" if others else f"must be {last}")


def _opaque(hint: Any) -> bool:
    """Whether the hint is a class, or a callable, that no plain value can be."""
    if hint in (bool, int, float, str, types.NoneType) or get_origin(hint) is not None:
        return get_origin(hint) is collections.abc.Callable
    return inspect.isclass(hint) and not is_dataclass(hint)


def _kind(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _kind(inner[0])
    if origin in (Union, types.UnionType):
        return " or ".join(map(_kind, [m for m in inner if not _opaque(m)] or inner))
    if origin is Literal:
        return " or ".join(map(word, inner))
    if origin in (list, tuple, collections.abc.Sequence, collections.abc.Iterable):
        return f"a list of {_kinds(inner[0])}"
    if origin in (dict, collections.abc.Mapping):
        return f"{{name: {_kind(inner[1])}}}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return {types.NoneType: "null", **names}.get(hint, getattr(hint, "__name__", str(hint)))


def _kinds(hint: Any) -> str:
    kind = _kind(hint)
    return f"{kind.removeprefix('a ')}s" if kind in ("a number", "a whole number") else kind


def _list(inner: Any, value: Any) -> Any:
    if isinstance(value, str | Mapping) or not isinstance(value, collections.abc.Iterable):
        raise MisfitError(f"must be a list of {_kinds(inner)}")
    return _entries(value, lambda: [fit(inner, entry) for entry in value])


def _tuple(inner: Sequence[Any], value: Any) -> Any:
    many = isinstance(value, collections.abc.Sequence) and not isinstance(value, str)
    if not many or len(value) != len(inner):
        raise MisfitError(f"must be a list of {len(inner)}: {', '.join(map(_kind, inner))}")
    return _entries(value, lambda: [fit(h, v) for h, v in zip(inner, value, strict=True)])


def _mapping(inner: Sequence[Any], value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise MisfitError(f"must be {{name: {_kind(inner[1])}}}")
    return _entries(value, lambda: {fit(inner[0], k): fit(inner[1], v) for k, v in value.items()})


def _entries(value: Any, make: Callable[[], Any]) -> Any:
    """The entries as they fit; the value itself where none had to change."""
    if not isinstance(value, list | tuple | Mapping):
        return value  # a generator or another container of the caller's own
    try:
        found = make()
    except MisfitError as wrong:
        raise MisfitError(f"every entry: {wrong.remedy}", kind=True) from None
    if isinstance(value, tuple):
        found = tuple(found)
    return value if found == value else found


def word(value: Any) -> str:
    """As :func:`shown`, for an option's own words, which need no quotes."""
    return value if isinstance(value, str) and value else shown(value)
