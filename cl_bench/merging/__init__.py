"""Merging of models that were trained apart. Imports torch, and nothing else of weight.

``RULES`` are folds over task vectors (:class:`Rule`), driven by :func:`fold` and
:func:`applied`, or :func:`merge` at once. Two rules need more than task vectors:
:func:`core_space` takes low-rank factors, :class:`FrankWolfe` a gradient.
"""

from collections.abc import Mapping

from cl_bench.merging.core_space import Factors, core_space, to_core
from cl_bench.merging.dop import Dop
from cl_bench.merging.frank_wolfe import FrankWolfe
from cl_bench.merging.linear import Average, Dare, MagMax, TaskArithmetic, drop
from cl_bench.merging.models import Folded, Weights, applied, fold, merge, shaped, update
from cl_bench.merging.opcm import Opcm
from cl_bench.merging.ota import Ota
from cl_bench.merging.rule import Deltas, Fold, Part, Rule
from cl_bench.merging.spectral import IsoC, IsoCts, TsvM, flattened
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

__all__ = [
    "RULES",
    "Average",
    "Dare",
    "Deltas",
    "Dop",
    "Factors",
    "Fold",
    "Folded",
    "FrankWolfe",
    "IsoC",
    "IsoCts",
    "MagMax",
    "Opcm",
    "Ota",
    "Part",
    "Rule",
    "TaskArithmetic",
    "Ties",
    "TsvM",
    "Weights",
    "applied",
    "core_space",
    "drop",
    "flattened",
    "fold",
    "merge",
    "shaped",
    "to_core",
    "update",
]
