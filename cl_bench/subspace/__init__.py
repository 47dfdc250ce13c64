"""The linear algebra that subspace methods share. Imports torch, and nothing else."""

from cl_bench.subspace.ahead import mark_drawn
from cl_bench.subspace.basis import complement, complement_within, extend, rank_to_reach
from cl_bench.subspace.confinement import Confinement, Where, unconfined
from cl_bench.subspace.growth import empty_basis, grow
from cl_bench.subspace.linear_maps import LinearMap, linear_maps, merged_parameters, plain_modules
from cl_bench.subspace.moments import Accumulator, Moments, tapped
from cl_bench.subspace.projection import Projection
from cl_bench.subspace.relaxation import leading_directions, split_as_published, split_by_angle
from cl_bench.subspace.relaxed import RelaxedSpaces
from cl_bench.subspace.rescaling import Rescaling, Scaling
from cl_bench.subspace.sketch import ResidualSketch, SketchKind, leading_inputs

__all__ = [
    "Accumulator",
    "Confinement",
    "LinearMap",
    "Moments",
    "Projection",
    "RelaxedSpaces",
    "Rescaling",
    "ResidualSketch",
    "Scaling",
    "SketchKind",
    "Where",
    "complement",
    "complement_within",
    "empty_basis",
    "extend",
    "grow",
    "leading_directions",
    "leading_inputs",
    "linear_maps",
    "mark_drawn",
    "merged_parameters",
    "plain_modules",
    "rank_to_reach",
    "split_as_published",
    "split_by_angle",
    "tapped",
    "unconfined",
]
