"""What is told of a merge, matrix by matrix."""

from collections.abc import Mapping

from cl_bench.merging import Weights, aligned_share, contradicted_share, cosine, shaped


def told(
    deltas: Weights,
    merged: Weights,
    matrices: frozenset[str],
    norms: dict[str, float],
    count: int,
    sizes: Mapping[str, int],
) -> dict[str, dict[str, float]]:
    """Quantities by layer.

    Args:
        deltas: the newest task's vectors.
        merged: what the merge adds.
        matrices: names of matrices.
        norms: the mean norm of each matrix's task vectors before; afterwards with the newest.
        count: tasks, the newest among them.
        sizes: bytes of what is kept of each weight.
    """
    found = {}
    for name in matrices & deltas.keys():
        delta, whole = shaped(deltas[name], True), shaped(merged[name], True)
        before = norms.get(name, 0.0)
        norms[name] = mean = before + (float(delta.norm()) - before) / count
        found[name.removesuffix(".weight")] = {
            "merge_aligned": aligned_share(delta, whole),
            "merge_cosine": cosine(delta, whole),
            "merge_contradicted": contradicted_share(delta, whole),
            "merge_norm_kept": float(whole.norm()) / mean if mean > 0 else 0.0,
            "merge_bytes": float(sizes[name]),
        }
    return found
