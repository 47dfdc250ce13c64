"""The linear algebra that subspace methods share. Imports torch, and nothing else."""

from cl_bench.subspace.ahead import mark_drawn
from cl_bench.subspace.basis import (
    complement,
    complement_within,
    extend,
    extend_to_span,
    rank_to_reach,
)
from cl_bench.subspace.confinement import ConfinedLinear, Confinement, Where, unconfined
from cl_bench.subspace.experts import bias_of, is_experts
from cl_bench.subspace.gates import ClosedWeights, Gates, steepness
from cl_bench.subspace.growth import empty_basis, grow
from cl_bench.subspace.linear_maps import (
    LinearMap,
    acting_weight,
    first_uses,
    is_adapted,
    is_transposed,
    linear_maps,
    merge_adapted,
    merged_parameters,
    plain_modules,
)
from cl_bench.subspace.mixture import Mixture
from cl_bench.subspace.moments import Accumulator, Moments, dropping, tapped
from cl_bench.subspace.owners import Owned, Owners, shared_fairly
from cl_bench.subspace.preservation import (
    CosineSum,
    effective_rank,
    preserved_rank,
    retention_ratios,
    snapped_rank,
)
from cl_bench.subspace.projection import Projection, inverse_projection
from cl_bench.subspace.recursive import RecursiveLeastSquares
from cl_bench.subspace.relaxation import leading_directions, split_as_published, split_by_angle
from cl_bench.subspace.relaxed import RelaxedSpaces
from cl_bench.subspace.rescaling import Rescaling, Scaling
from cl_bench.subspace.restricted import (
    CoreUpdate,
    FactorUpdate,
    Kind,
    Parametrisation,
    RestrictedUpdate,
    Restriction,
    StepUpdate,
    restricted_update,
)
from cl_bench.subspace.restricted_weights import RestrictedWeights
from cl_bench.subspace.ridge import Sums, add_gram, block_rows, chosen, solve_ridge
from cl_bench.subspace.rows import (
    added_up,
    as_rows,
    joined,
    own_rows,
    rows_of,
    shared_out,
)
from cl_bench.subspace.sketch import ResidualSketch, SketchKind, leading_inputs
from cl_bench.subspace.sparse_gp import SparseGP
from cl_bench.subspace.spectrum import Spectrum, Split, largest_value, spectra
from cl_bench.subspace.units import UnitChain

__all__ = [
    "Accumulator",
    "ClosedWeights",
    "ConfinedLinear",
    "Confinement",
    "CoreUpdate",
    "CosineSum",
    "FactorUpdate",
    "Gates",
    "Kind",
    "LinearMap",
    "Mixture",
    "Moments",
    "Owned",
    "Owners",
    "Parametrisation",
    "Projection",
    "RecursiveLeastSquares",
    "RelaxedSpaces",
    "Rescaling",
    "ResidualSketch",
    "RestrictedUpdate",
    "RestrictedWeights",
    "Restriction",
    "Scaling",
    "SketchKind",
    "SparseGP",
    "Spectrum",
    "Split",
    "StepUpdate",
    "Sums",
    "UnitChain",
    "Where",
    "acting_weight",
    "add_gram",
    "added_up",
    "as_rows",
    "bias_of",
    "block_rows",
    "chosen",
    "complement",
    "complement_within",
    "dropping",
    "effective_rank",
    "empty_basis",
    "extend",
    "extend_to_span",
    "first_uses",
    "grow",
    "inverse_projection",
    "is_adapted",
    "is_experts",
    "is_transposed",
    "joined",
    "largest_value",
    "leading_directions",
    "leading_inputs",
    "linear_maps",
    "mark_drawn",
    "merge_adapted",
    "merged_parameters",
    "own_rows",
    "plain_modules",
    "preserved_rank",
    "rank_to_reach",
    "restricted_update",
    "retention_ratios",
    "rows_of",
    "shared_fairly",
    "shared_out",
    "snapped_rank",
    "solve_ridge",
    "spectra",
    "split_as_published",
    "split_by_angle",
    "steepness",
    "tapped",
    "unconfined",
]
