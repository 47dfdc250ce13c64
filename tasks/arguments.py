"""How a stream says that an argument is wrong: by its configuration key, with the remedy."""

from typing import Annotated, Literal

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.options import OnlyWith, Range, shown

Rows = Literal["first", "random"]
"""Which rows become validation data."""
Order = Literal["fixed", "random"]
ClassOrder = Literal["fixed", "random", "seed_1993"]
OrderSeed = Annotated[int, Range(least=0, below=2**32)]
SplitSeed = Annotated[
    OrderSeed, OnlyWith("class_order", ("random",)), OnlyWith("validation_split", ("random",))
]
RotationSeed = Annotated[
    OrderSeed, OnlyWith("angle_order", ("random",)), OnlyWith("validation_split", ("random",))
]
HeldOut = Annotated[Rows, OnlyWith("validation_fraction")]
Permutations = Annotated[int, Range(least=1, most=100)]
"""The number of distinct seeds."""
Rotations = Annotated[int, Range(least=1, most=360)]
Angle = Annotated[float, Range(above=0, most=360)]
"""In degrees."""
Angles = Literal["even", "uniform"]
"""Of a stream's tasks: as far apart, or drawn."""


def require(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raise a :class:`UsageError` ``stream.<key>=<value>: <remedy>`` unless ``condition``."""
    if not condition:
        raise UsageError(f"stream.{key}={shown(value)}: {remedy}")
