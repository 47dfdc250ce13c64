"""Options checked against annotations in one place, before any work starts.

:mod:`cl_bench.contracts.options` has the rules.
"""

import collections.abc
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin

from cl_bench.contracts.fitting import MisfitError, fit, word
from cl_bench.contracts.options import Inheriting, OnlyWith, Range, shown
from cl_bench.errors import UsageError

Made = TypeVar("Made", bound=Callable[..., Any])


def annotations(made: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a callable's parameters, with ranges; ``Any`` where one is unreadable."""
    called: Any = made.__init__ if inspect.isclass(made) else made
    base = getattr(called, "__inherits__", None)
    function: Any = inspect.unwrap(called)
    function = getattr(function, "func", function)
    names = {**vars(typing), **vars(collections.abc), **getattr(function, "__globals__", {})}
    found = {} if base is None else annotations(base)
    for name, hint in getattr(function, "__annotations__", {}).items():
        holder = types.SimpleNamespace(__annotations__={name: hint})
        try:
            found[name] = typing.get_type_hints(holder, names, include_extras=True)[name]
        except (NameError, TypeError, AttributeError, SyntaxError):
            found[name] = Any  # a name that only type checkers import
    found.pop("return", None)
    return found if base is None else {k: v for k, v in found.items() if not _inherits(v)}


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
            found[name] = fit(hint, value)
        except MisfitError as wrong:
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
        init = _checking(kind.__init__, prefix, bound=True)
        kind.__init__ = _inheriting(kind, init)  # type: ignore[method-assign]
        return made

    return decorate


def _inheriting(kind: Any, init: Any) -> Any:
    """``init`` with the options of the base of ``kind`` among its own, where it hands them on."""
    base = kind.__mro__[1].__init__
    signature, hints = inspect.signature(init), annotations(init)
    own = [p for p in signature.parameters.values() if not _inherits(hints.get(p.name))]
    if len(own) < len(signature.parameters):
        names = {p.name for p in own}
        shared = [
            p.replace(kind=p.KEYWORD_ONLY)
            for p in inspect.signature(base).parameters.values()
            if p.name not in names and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        init.__inherits__ = base
        init.__signature__ = signature.replace(parameters=[*own, *shared])
    return init


def _inherits(hint: Any) -> bool:
    return any(isinstance(marker, Inheriting) for marker in _markers(hint))


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


def _allows_null(hint: Any) -> bool:
    try:
        fit(hint, None)
    except MisfitError:
        return False
    return True


def _default(default: Any) -> str:
    plain = isinstance(default, bool | int | float | str | list | tuple) or default is None
    return f"; by default {word(default)}" if plain else ""


def _markers(hint: Any) -> list[Any]:
    """What ``Annotated`` adds, in a union too."""
    if get_origin(hint) is Annotated:
        inner, *markers = get_args(hint)
        return [*markers, *_markers(inner)]
    if get_origin(hint) in (Union, types.UnionType):
        return [m for member in get_args(hint) for m in _markers(member)]
    return []
