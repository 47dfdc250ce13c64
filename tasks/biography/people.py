"""Who lives in the world: names and values, a pure function of the seed and the person's number."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.randomness import generator

BLOCK = 4096
"""Draws are made in blocks of this many, so that nobody depends on how many people there are."""


@dataclass(frozen=True)
class People:
    """Everybody, by number.

    Attributes:
        names: int64 (n, 3): first, middle and last name, by position in their pools; unique.
        female: bool (n,).
        values: int64 (n,) for every attribute, by position in its pool.
        seats: int64 (companies,), the city of every company.
    """

    names: Tensor
    female: Tensor
    values: Mapping[str, Tensor]
    seats: Tensor


def draw(seed: int, what: str, count: int, below: int) -> Tensor:
    """int64 (count,), uniform in [0, below); the first ones do not depend on ``count``."""
    blocks = [
        torch.randint(below, (BLOCK,), generator=generator(seed, what, block))
        for block in range(-(-count // BLOCK))
    ]
    return torch.cat(blocks)[:count] if blocks else torch.zeros(0, dtype=torch.long)


def populate(
    seed: int, count: int, names: tuple[int, int, int], sizes: Mapping[str, int]
) -> People:
    """Everybody from 0 to ``count`` - 1.

    All attributes are drawn uniformly and independently, except that the company's city is a
    function of the company.

    Args:
        seed: of the world.
        count: how many people.
        names: sizes of the name pools.
        sizes: sizes of the value pools of all six attributes.

    Raises:
        UsageError: the names do not suffice.
    """
    values = {
        what: draw(seed, what, count, size)
        for what, size in sizes.items()
        if what != "company_city"
    }
    seats = draw(seed, "headquarters", sizes["company"], sizes["company_city"])
    values["company_city"] = seats[values["company"]]
    return People(
        names=_unique_names(seed, count, names),
        female=draw(seed, "gender", count, 2).bool(),
        values=values,
        seats=seats,
    )


def _unique_names(seed: int, count: int, sizes: tuple[int, int, int]) -> Tensor:
    """Person i has the i-th different name among uniform draws."""
    space = sizes[0] * sizes[1] * sizes[2]
    if 2 * count > space:
        raise UsageError(
            f"stream.names={list(sizes)}: {space} full names are too few for {count} people; "
            "allow more, or ask for fewer people"
        )
    wanted = count
    while True:
        drawn = draw(seed, "name", wanted, space).numpy()
        _, first = np.unique(drawn, return_index=True)
        if len(first) >= count:
            break
        wanted += BLOCK
    code = torch.from_numpy(drawn[np.sort(first)[:count]])
    return torch.stack(
        [code // (sizes[1] * sizes[2]), code // sizes[2] % sizes[1], code % sizes[2]], dim=1
    )
