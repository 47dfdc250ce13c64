"""The linear algebra that subspace methods share. Imports torch, and nothing else."""

from cl_bench.subspace.ahead import mark_drawn
from cl_bench.subspace.basis import complement, extend, rank_to_reach
from cl_bench.subspace.confinement import Confinement, Where, unconfined
from cl_bench.subspace.linear_maps import LinearMap, linear_maps
from cl_bench.subspace.moments import Moments, tapped
from cl_bench.subspace.projection import Projection

__all__ = [
    "Confinement",
    "LinearMap",
    "Moments",
    "Projection",
    "Where",
    "complement",
    "extend",
    "linear_maps",
    "mark_drawn",
    "rank_to_reach",
    "tapped",
    "unconfined",
]
