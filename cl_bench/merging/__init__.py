"""Merging of models that were trained apart. Imports torch, and nothing else of weight.

``RULES`` are folds over task vectors (:class:`Rule`), driven by :func:`fold` and
:func:`applied`, or :func:`merge` at once. Two rules need more than task vectors:
:func:`core_space` takes low-rank factors, :class:`FrankWolfe` a gradient.
"""

from cl_bench.merging.agreement import aligned_share, contradicted_share, cosine
from cl_bench.merging.choice import RULES, make_rule, options_of
from cl_bench.merging.core_space import Factors, core_factors, core_space, to_core
from cl_bench.merging.dop import Dop
from cl_bench.merging.frank_wolfe import FrankWolfe
from cl_bench.merging.linear import Average, Dare, MagMax, TaskArithmetic, drop
from cl_bench.merging.models import Folded, Weights, applied, fold, merge, shaped, update
from cl_bench.merging.opcm import Opcm
from cl_bench.merging.osrm import osrm_rows
from cl_bench.merging.ota import Ota
from cl_bench.merging.rule import Deltas, Fold, Part, Rule
from cl_bench.merging.spectral import IsoC, IsoCts, TsvM, flattened
from cl_bench.merging.ties import Ties

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
    "aligned_share",
    "applied",
    "contradicted_share",
    "core_factors",
    "core_space",
    "cosine",
    "drop",
    "flattened",
    "fold",
    "make_rule",
    "merge",
    "options_of",
    "osrm_rows",
    "shaped",
    "to_core",
    "update",
]
