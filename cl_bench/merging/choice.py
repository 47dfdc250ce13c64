"""Rules by name."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from cl_bench.merging.dop import Dop
from cl_bench.merging.linear import Average, Dare, MagMax, TaskArithmetic
from cl_bench.merging.opcm import Opcm
from cl_bench.merging.ota import Ota
from cl_bench.merging.rule import Rule
from cl_bench.merging.spectral import IsoC, IsoCts, TsvM
from cl_bench.merging.ties import Ties

RULES: Mapping[str, type[Rule]] = {
    "average": Average,
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
    "dare": Dare,
    "magmax": MagMax,
    "tsv_m": TsvM,
    "iso_c": IsoC,
    "iso_cts": IsoCts,
    "opcm": Opcm,
    "dop": Dop,
    "ota": Ota,
}
"""By the names that settings have for them."""


def options_of(rule: str, inner: str | None = None) -> frozenset[str]:
    """Which options the rule called ``rule`` has; DARE has its inner rule's too."""
    own = {field.name for field in fields(RULES[rule])}
    if rule == "dare":
        own |= options_of(inner or "task_arithmetic")
    return frozenset(own)


def make_rule(rule: str, options: Mapping[str, Any]) -> Rule:
    """The rule called ``rule`` with those of the options that it has; None is its default.

    Of DARE ``inner`` names the inner rule, which takes the scale and its own options from here.

    Raises:
        ValueError: an option is out of range.
    """
    kind, given = RULES[rule], {k: v for k, v in options.items() if v is not None}
    own = {k: given[k] for k in (f.name for f in fields(kind)) if k in given}
    if not issubclass(kind, Dare):
        return kind(**own)
    inner = make_rule(own.pop("inner", "task_arithmetic"), given)
    own.pop("scale", None)
    return replace(kind(**own), inner=inner)
