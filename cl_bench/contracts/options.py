"""What an option may be, read from annotations and checked in one place, before any work starts.

An annotation says the kind: ``bool``, ``int``, ``float``, ``str``, ``Literal``, ``X | None``,
sequences, mappings, dataclasses. ``Annotated`` adds a range, ``Annotated[float, Within(0, 1)]``, or
:class:`OnlyWith` the option without which this one does nothing. The rules:

* A boolean is ``true`` or ``false``; words and numbers that stand for one are refused, and so is a
  boolean where a number is meant. Where a ``Literal`` has the word ``"true"``, ``true`` is that.
* A whole number is written as one: 10, not 10.0. A number is finite. Text is no number.
* None stands where the annotation or the default has it.
* What cannot be told from an annotation (``Any``, a protocol, a module) is not checked.
"""

import collections.abc
import difflib
import functools
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

from cl_bench.errors import UsageError

Made = TypeVar("Made", bound=Callable[..., Any])


@dataclass(frozen=True)
class Range:
    """Where a number must lie; each end may be open.

    Attributes:
        least, most: ends that may be reached.
        above, below: ends that may not.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        low, opening = (self.above, "(") if self.above >= self.least else (self.least, "[")
        high, closing = (self.below, ")") if self.below <= self.most else (self.most, "]")
        if high == math.inf:
            if low == 0 and opening == "[":
                return "must not be negative"
            return f"at least {low:.12g}" if opening == "[" else f"must be above {low:.12g}"
        return f"must lie in {opening}{low:.12g}, {high:.12g}{closing}"


@dataclass(frozen=True)
class Length:
    """How many entries a list must have."""

    least: int


@dataclass(frozen=True)
class OnlyWith:
    """The option has an effect only beside another one of the same object.

    Of several of these on one option, one must hold.

    Attributes:
        option: the other one.
        values: with which this one has an effect; none means all but null, false, 0 and empty.
    """

    option: str
    values: tuple[Any, ...] = ()

    def holds(self, value: Any) -> bool:
        """Whether the other option's value lets this one have an effect."""
        return any(shown(value) == shown(v) for v in self.values) if self.values else bool(value)

    def __str__(self) -> str:
        return f"{self.option}={' or '.join(map(shown, self.values)) or '...'}"


NotNegative, Positive = Range(least=0), Range(above=0)
Count = Annotated[int, Range(least=1)]
"""How many there are: at least 1."""
Index = Annotated[int, Range(least=0)]
"""Counted from 0; also how many there are, if there may be none."""
Strength = Annotated[float, NotNegative]
Rate = Annotated[float, Positive]
Share = Annotated[float, Range(least=0, most=1)]
"""In [0, 1]."""
SomeShare = Annotated[float, Range(above=0, most=1)]
"""In (0, 1]: some of it."""
PartShare = Annotated[float, Range(least=0, below=1)]
"""In [0, 1): not all of it."""
Widths = Annotated[Sequence[Count], Length(1)]
"""Of layers, at least one."""
Seed = Index
"""Any whole number that is not negative."""


PLAIN = (bool, int, float, str, list, tuple, dict, types.NoneType)
"""What a configuration holds."""


class _MisfitError(Exception):
    """A value is not what the annotation asks for.

    Args:
        remedy: what it should be.
        kind: whether the kind is right, and only the value is wrong.
    """

    def __init__(self, remedy: str, kind: bool = False) -> None:
        super().__init__(remedy)
        self.remedy, self.kind = remedy, kind


def annotations(made: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a callable's parameters, with ranges; ``Any`` where one is unreadable."""
    function: Any = inspect.unwrap(made.__init__ if inspect.isclass(made) else made)
    function = getattr(function, "func", function)
    names = {**vars(typing), **vars(collections.abc), **getattr(function, "__globals__", {})}
    found = {}
    for name, hint in getattr(function, "__annotations__", {}).items():
        holder = types.SimpleNamespace(__annotations__={name: hint})
        try:
            found[name] = typing.get_type_hints(holder, names, include_extras=True)[name]
        except (NameError, TypeError, AttributeError, SyntaxError):
            found[name] = Any  # a name that only type checkers import
    found.pop("return", None)
    return found


def check(
    made: Callable[..., Any],
    values: Mapping[str, Any],
    prefix: str = "",
    ranges: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The values as ``made`` takes them.

    Args:
        made: a class or a function, whose annotations say what its options may be.
        values: options by name; those that it does not have are passed on as they are.
        prefix: what stands before an option's name in messages: ``"strategy."``.
        ranges: of options of a class that is not ours: a :class:`Range`, or an annotation that
            stands in place of that class's own.

    Raises:
        UsageError: a value is not what its annotation asks for.
    """
    hints, parameters = annotations(made), inspect.signature(made).parameters
    found = dict(values)
    for name, value in values.items():
        default = parameters[name].default if name in parameters else inspect.Parameter.empty
        if name not in hints or (value is None and default is None):
            continue
        hint = hints[name]
        if ranges and name in ranges:
            own = ranges[name]
            hint = Annotated[hint, own] if isinstance(own, Range) else own
        try:
            found[name] = _fit(hint, value)
        except _MisfitError as wrong:
            told = shown(default) == shown(value) or (
                default is None and ("null" in wrong.remedy or not _allows_null(hint))
            )
            hint = "" if told else _default(default)
            raise UsageError(f"{prefix}{name}={shown(value)}: {wrong.remedy}{hint}") from None
    return found


def checked(prefix: str) -> Callable[[Made], Made]:
    """Decorator of a class or a function whose arguments are checked whenever it is called.

    Args:
        prefix: what stands before an option's name in messages: ``"eval."``.
    """

    def decorate(made: Made) -> Made:
        kind: Any = made
        if not inspect.isclass(kind):
            return cast(Made, _checking(kind, prefix, bound=False))
        kind.__init__ = _checking(kind.__init__, prefix, bound=True)  # type: ignore[method-assign]
        return made

    return decorate


def _checking(function: Any, prefix: str, bound: bool) -> Any:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        names = list(given.arguments)[1:] if bound else list(given.arguments)
        plain = {
            name: given.arguments[name]
            for name in names
            if signature.parameters[name].kind
            not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        }
        given.arguments.update(check(function, plain, prefix))
        return function(*given.args, **given.kwargs)

    return wrapper


def without_effect(
    made: Callable[..., Any], values: Mapping[str, Any], names: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Which of some options do nothing beside the others, each with what it would need.

    Args:
        made: a class or a function.
        values: all options, by name.
        names: of the options to look at.
    """
    hints, parameters = annotations(made), inspect.signature(made).parameters
    for name in names:
        needed = [m for m in _markers(hints.get(name)) if isinstance(m, OnlyWith)]
        others = [values.get(m.option, parameters[m.option].default) for m in needed]
        if needed and not any(m.holds(v) for m, v in zip(needed, others, strict=True)):
            yield name, " or ".join(map(str, needed))


def known(wrong: str, names: Sequence[str], prefix: str = "") -> str:
    """A hint at the name that was meant, if one is near."""
    close = difflib.get_close_matches(wrong, list(names), n=1)
    return f" Did you mean {prefix}{close[0]}?" if close else ""


def shown(value: Any) -> str:
    """A value as it is written in a configuration."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {shown(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return repr(value) if isinstance(value, str) and _ambiguous(value) else f"{value}"


def _ambiguous(text: str) -> bool:
    """Whether the text would be read as something else without quotes."""
    try:
        float(text)
    except ValueError:
        return text.lower() in ("", "true", "false", "null")
    return True


def _allows_null(hint: Any) -> bool:
    try:
        _fit(hint, None)
    except _MisfitError:
        return False
    return True


def _default(default: Any) -> str:
    plain = isinstance(default, bool | int | float | str | list | tuple) or default is None
    return f"; by default {_word(default)}" if plain else ""


def _word(value: Any) -> str:
    """As :func:`shown`, for an option's own words, which need no quotes."""
    return value if isinstance(value, str) and value else shown(value)


def _markers(hint: Any) -> list[Any]:
    """What ``Annotated`` adds, in a union too."""
    if get_origin(hint) is Annotated:
        inner, *markers = get_args(hint)
        return [*markers, *_markers(inner)]
    if get_origin(hint) in (Union, types.UnionType):
        return [m for member in get_args(hint) for m in _markers(member)]
    return []


def _fit(hint: Any, value: Any) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _in_ranges(_fit(inner[0], value), inner[1:])
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
            raise _MisfitError("must be a finite number", kind=True)
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
        raise _MisfitError(remedy)
    return value


def _is_number(value: Any, kind: type) -> bool:
    # numpy's booleans are no numbers of Python's, bool is.
    return isinstance(value, kind) and not isinstance(value, bool)


def _in_ranges(value: Any, markers: Sequence[Any]) -> Any:
    for marker in markers:
        if isinstance(marker, Length) and not value and isinstance(value, str):
            raise _MisfitError("must not be empty", kind=True)
        if isinstance(marker, Length) and len(value) < marker.least:
            raise _MisfitError(f"name at least {marker.least}", kind=True)
        if isinstance(marker, Range):
            for entry in value if isinstance(value, list | tuple) else [value]:
                if _is_number(entry, numbers.Real) and entry not in marker:
                    raise _MisfitError(str(marker), kind=True)
    return value


def _literal(allowed: Sequence[Any], value: Any) -> Any:
    for choice in allowed:
        if value == choice and type(value) is type(choice):
            return value
    if isinstance(value, bool) and shown(value) in allowed:
        return shown(value)  # YAML reads the word as a boolean
    *others, last = dict.fromkeys(map(_word, allowed))
    remedy = f"use {', '.join(others)} or {last}" if others else f"use {last}"
    raise _MisfitError(remedy, kind=isinstance(value, str))


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
            return _fit(member, value)
        except _MisfitError as wrong:
            failed.append(wrong)
    plain = [m for m in members if not _opaque(m)]
    alone = len([m for m in plain if m is not types.NoneType]) == 1
    near = [wrong.remedy for wrong in failed if wrong.kind and (alone or not words)]
    if near:
        raise _MisfitError(near[0] + ", or null" * (types.NoneType in members), kind=True)
    *others, last = dict.fromkeys(map(_kind, plain))
    raise _MisfitError(f"must be {', '.join(others)} or {last}" if others else f"must be {last}")


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
        return " or ".join(map(_word, inner))
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
        raise _MisfitError(f"must be a list of {_kinds(inner)}")
    return _entries(value, lambda: [_fit(inner, entry) for entry in value])


def _tuple(inner: Sequence[Any], value: Any) -> Any:
    many = isinstance(value, collections.abc.Sequence) and not isinstance(value, str)
    if not many or len(value) != len(inner):
        raise _MisfitError(f"must be a list of {len(inner)}: {', '.join(map(_kind, inner))}")
    return _entries(value, lambda: [_fit(h, v) for h, v in zip(inner, value, strict=True)])


def _mapping(inner: Sequence[Any], value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise _MisfitError(f"must be {{name: {_kind(inner[1])}}}")
    return _entries(value, lambda: {_fit(inner[0], k): _fit(inner[1], v) for k, v in value.items()})


def _entries(value: Any, make: Callable[[], Any]) -> Any:
    """The entries as they fit; the value itself where none had to change."""
    if not isinstance(value, list | tuple | Mapping):
        return value  # a generator or another container of the caller's own
    try:
        found = make()
    except _MisfitError as wrong:
        raise _MisfitError(f"every entry: {wrong.remedy}", kind=True) from None
    if isinstance(value, tuple):
        found = tuple(found)
    return value if found == value else found
