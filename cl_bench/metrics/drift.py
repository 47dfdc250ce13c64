"""How hidden states of n old inputs moved: H (n, d) before, H' (n, d) after.

Zheng et al., ICLR 2025, section 4, follow the leading principal component. Its angle alone is noise
where the first two components are about as large: by Davis and Kahan sin(angle) is bounded by
2 ||C' - C|| / (lambda_1 - lambda_2), C and C' the covariances, so the gap stands beside it.
"""

import math

import torch
from torch import Tensor

from cl_bench.metrics.alignment import relative_change, share_inside


def principal_directions(states: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Leading principal components of centred states.

    Args:
        states: H (n, d).
        k: how many; fewer where H - mean has a smaller rank.

    Returns:
        Directions (d, k) and all variances in falling order, both float64.
    """
    H = states.double()
    H = H - H.mean(0)
    _, S, V = torch.linalg.svd(H, full_matrices=False)
    rank = int((S[:1] * 1e-9 < S).sum()) if len(S) and float(S[0]) > 0 else 0
    return V[: min(k, rank)].t(), S.square() / max(1, len(H) - 1)


def component_angle(before: Tensor, after: Tensor) -> float:
    """Angle in degrees, in [0, 90], between the first principal components; NaN without variance.

    The sign of a component is nobody's choice, so it does not count.
    """
    one, other = (principal_directions(H, 1)[0] for H in (before, after))
    if one.shape[1] == 0 or other.shape[1] == 0:
        return math.nan
    u, v = one[:, 0], other[:, 0]
    along = u @ v
    return math.degrees(math.atan2(float((v - along * u).norm()), abs(float(along))))


def component_gap(states: Tensor) -> float:
    """(lambda_1 - lambda_2) / lambda_1: near 0 the first component is arbitrary.

    1 where there is only one direction, NaN where there is none.
    """
    variances = principal_directions(states, 1)[1]
    if not len(variances) or float(variances[0]) == 0.0:
        return math.nan
    second = float(variances[1]) if len(variances) > 1 else 0.0
    return 1 - second / float(variances[0])


def linear_cka(before: Tensor, after: Tensor) -> float:
    """||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F) of centred states; NaN where either is constant.

    1 for states that differ by a rotation and a factor only. Kornblith, Norouzi, Lee & Hinton,
    "Similarity of Neural Network Representations Revisited", ICML 2019.
    """
    X, Y = (H.double() - H.double().mean(0) for H in (before, after))
    if max(X.shape[1], Y.shape[1]) > len(X):  # <X X^T, Y Y^T> is the same number
        K, L = X @ X.t(), Y @ Y.t()
        shared, norms = float((K * L).sum()), float(K.norm() * L.norm())
    else:
        shared = float((X.t() @ Y).square().sum())
        norms = float((X.t() @ X).norm() * (Y.t() @ Y).norm())
    return shared / norms if norms > 0 else math.nan


def shift_in_top(before: Tensor, after: Tensor, k: int) -> float:
    """||(H' - H) V_k||_F^2 / ||H' - H||_F^2, V_k the top k components before.

    Small where states moved in directions that told old inputs little apart; NaN where they did not
    move or did not vary.
    """
    V = principal_directions(before, k)[0]
    return share_inside(after.double() - before.double(), V) if V.shape[1] else math.nan


def drift(before: Tensor, after: Tensor, k: int) -> dict[str, float]:
    """Everything above by name: ``pc_angle``, ``pc_gap``, ``shift``, ``cka``, ``shift_in_top``."""
    return {
        "pc_angle": component_angle(before, after),
        "pc_gap": component_gap(before),
        "shift": relative_change(before, after),
        "cka": linear_cka(before, after),
        "shift_in_top": shift_in_top(before, after, k),
    }
