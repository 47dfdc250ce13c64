"""How a stream says that an argument is wrong: by its configuration key, with the remedy."""

from cl_bench.contracts.errors import UsageError


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raise a :class:`UsageError` ``stream.<key>=<value>: <remedy>`` unless ``condition``."""
    if not condition:
        shown = "null" if value is None else value
        raise UsageError(f"stream.{key}={shown}: {remedy}")


def require_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a :class:`UsageError` unless ``value`` is one of ``choices``."""
    require(value in choices, key, value, f"choose one of {', '.join(choices)}")
