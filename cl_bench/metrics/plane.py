"""The plane through three sets of weights: theta(a, b) = theta_0 + a u + b v.

The directions are u = theta_1 - theta_0 and v = theta_2 - theta_1, so that (0, 0), (1, 0) and
(1, 1) are the three themselves. They are neither orthogonal nor of one length: distances in
the plane mean nothing without :func:`describe_plane`.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def at(origin: Weights, first: Weights, second: Weights, a: float, b: float) -> dict[str, Tensor]:
    """theta(a, b), tensor by tensor; exactly the three sets themselves at their places.

    Args:
        origin: theta_0.
        first: theta_1.
        second: theta_2.
        a: along theta_1 - theta_0.
        b: along theta_2 - theta_1.
    """
    known = {(0.0, 0.0): origin, (1.0, 0.0): first, (1.0, 1.0): second}
    if (a, b) in known:  # not rounded on the way
        return {name: value.clone() for name, value in known[a, b].items()}
    return {
        name: (o.double() + a * (first[name] - o).double() + b * (second[name] - first[name])).to(o)
        for name, o in origin.items()
    }


def describe_plane(origin: Weights, first: Weights, second: Weights) -> dict[str, float]:
    """``u_norm``, ``v_norm`` and ``cosine`` between the directions; NaN if one is zero."""
    uu, vv, uv = 0.0, 0.0, 0.0
    for name, o in origin.items():
        u, v = (first[name] - o).double(), (second[name] - first[name]).double()
        uu += float(u.square().sum())
        vv += float(v.square().sum())
        uv += float((u * v).sum())
    cosine = uv / math.sqrt(uu * vv) if uu * vv > 0 else math.nan
    return {"u_norm": math.sqrt(uu), "v_norm": math.sqrt(vv), "cosine": cosine}


def project(
    origin: Weights, first: Weights, second: Weights, point: Weights
) -> tuple[float, float]:
    """The (a, b) whose theta(a, b) lies nearest to ``point``; NaN if u and v are parallel."""
    gram, right = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for name, o in origin.items():
        axes = torch.stack([(first[name] - o).flatten(), (second[name] - first[name]).flatten()])
        axes = axes.double().cpu()
        gram += axes @ axes.t()
        right += axes @ (point[name] - o).flatten().double().cpu()
    if float(torch.linalg.det(gram)) <= 1e-12 * float(gram[0, 0] * gram[1, 1]):
        return math.nan, math.nan
    a, b = torch.linalg.solve(gram, right).tolist()
    return a, b
