"""The memory that matrices take whose leading singular triplets are kept, by shapes alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from cl_bench.contracts import Learner, Memory
from cl_bench.subspace import LinearMap, Parametrisation, preserved_rank, shared_fairly
from cl_bench.subspace.spectrum import BATCH_ELEMENTS


@dataclass(frozen=True)
class _Bytes:
    """Of some matrices."""

    trained: int = 0
    kept: int = 0
    stepping: int = 0
    boundary: int = 0
    change: int = 0
    splits: int = 0

    @property
    def total(self) -> int:
        return self.trained + self.kept + max(self.stepping, self.boundary)


def held_by_one(
    learner: Learner,
    layers: Sequence[LinearMap],
    processes: int,
    ratio: float | None,
    parametrisation: Parametrisation,
    rest: str,
) -> Memory:
    """What the process holds whose matrices take the most.

    Args:
        learner: of which all but the layers learns as ``rest`` says.
        layers: whose matrices are constrained.
        processes: that share weights out.
        ratio: of directions kept in the last task; None if no task is constrained.
        parametrisation: what is trained; with ``dense_projected`` nobody owns a matrix.
        rest: ``all``, ``norms`` or ``none``.
    """
    dense = parametrisation == "dense_projected"
    if ratio is None:
        whole = sum(_numbers(m) * m.weight.element_size() for m in layers)
        each = whole if dense else -(-whole // processes)
        return Memory(kept=each, boundary=2 * each)
    of = {m.name: 0 for m in layers} if dense else shared_fairly(layers, processes)
    owners = sorted(set(of.values()))
    found = [
        _of([m for m in layers if of[m.name] == q], ratio, parametrisation, processes)
        for q in owners
    ]
    most = max(found, key=lambda part: part.total)
    names = {id(p): n for n, p in learner.network.named_parameters()}
    matrices = {id(m.weight) for m in layers}
    held = []
    if rest != "all":
        held = learner.others([m.weight for m in layers], norms=rest == "norms")
    return Memory(
        frozen=frozenset(names[id(p)] for p in held if id(p) in names),
        unstepped=frozenset() if dense else frozenset(names[i] for i in matrices if i in names),
        trained=most.trained,
        kept=most.kept,
        stepping=most.stepping,
        boundary=most.boundary,
        saved_between=0 if dense else most.change,
        saved_inside=0 if dense else most.splits + most.trained,
    )


def _numbers(layer: LinearMap) -> int:
    return layer.in_features * layer.out_features


def _of(
    layers: Sequence[LinearMap], ratio: float, parametrisation: Parametrisation, processes: int
) -> _Bytes:
    """Of the matrices of one process."""
    trained = kept = stepping = change = splits = 0
    tallest = eigen = 0
    for m in layers:
        n, d = m.out_features, m.in_features
        r, width = min(n, d), max(4, m.weight.element_size())
        k = preserved_rank(ratio, r)
        own = m.weight.element_size() * n * d
        low = r - k
        # W_0 as it was, and in float32 where that is another; U_h, V_h, the short side's rest.
        kept += own * (1 if width == m.weight.element_size() else 3)
        both = 2 if n == d or parametrisation == "factored" else 1
        splits += width * (k * (n + d) + low * r * both)
        if parametrisation == "projected_param":
            trained += width * (n - k * (n <= d)) * (d - k * (d <= n))
            stepping += 2 * own
        elif parametrisation == "factored":
            trained += width * low * (n + d + 1)
            kept += width * n * d  # the part that stays
            stepping += 2 * own
        else:
            kept += own // processes  # rows from before the step
            stepping = max(stepping, 3 * own // processes)
        change += own
        tallest = max(tallest, 8 * 3 * n * d)
        eigen = max(eigen, 8 * 4 * r * r)
    gathered = min(
        BATCH_ELEMENTS * 8 * 4, sum(8 * 4 * min(m.in_features, m.out_features) ** 2 for m in layers)
    )
    boundary = 2 * change + max(gathered, eigen) + tallest
    return _Bytes(trained, kept + splits, stepping, boundary, change, splits)
