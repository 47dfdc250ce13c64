"""An adapter tried on copies of layers before any work: its size, and whether it fits."""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cl_bench.adapters.attached import LOOKING, Attached, plain_start, start_of, unfit
from cl_bench.contracts import UsageError
from cl_bench.subspace import LinearMap, acting_weight, is_transposed

START = 1e-5
"""Most that a start may change of outputs, as a share of the largest: rounding."""

NEAR = 0.05
"""A count that differs from what was asked for by no more than this share will do."""

FAR = 2.0
"""A count that differs from what was asked for by more than this factor is none of that budget."""


def trial(maps: Sequence[LinearMap], config: Any, apart: bool = False) -> tuple[int, float]:
    """How many numbers the adapter trains, and how much its start changes outputs.

    One layer of every kind and shape is copied and adapted; what layers share counts once.

    Args:
        maps: the layers.
        config: of the adapter. Starts from data are left out.
        apart: copy all of the layers, as is done where the adapter's parameters are shared.

    Raises:
        UsageError: it does not fit the layers.
    """
    kinds: dict[Any, list[LinearMap]] = {}
    for m in maps:
        kind = (type(m.module), m.weight.shape, m.groups, m.bias is None)
        kinds.setdefault(m.name if apart else kind, []).append(m)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        modules = [_bare(alike[0].module) for alike in kinds.values()]
        network = nn.ModuleDict({f"layer{i}": module for i, module in enumerate(modules)}).eval()
        copies = [
            replace(alike[0], name=name, module=module)
            for (name, module), alike in zip(network.items(), kinds.values(), strict=True)
        ]
        inputs = [_inputs(module) for module in modules]
        before = [module(x) for module, x in zip(modules, inputs, strict=True)]
        attached = Attached(network, copies, config, "trial")
        owners: dict[Tensor, list[int]] = {}
        for i, layer in enumerate(attached.layers.values()):
            for parameter in {p for p in layer.parameters() if p.requires_grad}:
                owners.setdefault(parameter, []).append(i)
        times = [len(alike) for alike in kinds.values()]
        if not apart and max(times) > 1 and any(len(i) > 1 for i in owners.values()):
            return trial(maps, config, apart=True)
        count = sum(p.numel() * (times[i[0]] if len(i) == 1 else 1) for p, i in owners.items())
        after = [
            _tried(layer, x, config)
            for layer, x in zip(attached.layers.values(), inputs, strict=True)
        ]
        change = max(
            float((a - b).abs().max() / b.abs().max()) for a, b in zip(after, before, strict=True)
        )
    return count, change


def _bare(module: nn.Module) -> nn.Module:
    """A copy of a layer without whatever hangs on it."""
    known: dict[int, Any] = {
        id(vars(module)[hooks]): OrderedDict() for hooks in vars(module) if "_hooks" in hooks
    }
    return copy.deepcopy(module, known).cpu()


def _inputs(module: Any) -> Tensor:
    """A few inputs of a layer, drawn at random."""
    weight = module.weight
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return torch.randn(2, module.in_channels, *(k + 1 for k in module.kernel_size)).to(weight)
    return torch.randn(4, weight.shape[0 if is_transposed(module) else 1]).to(weight)


def _tried(layer: Any, x: Tensor, config: Any) -> Tensor:
    try:
        acting_weight(layer)
        return layer(x)  # type: ignore[no-any-return]
    except (RuntimeError, ValueError, TypeError) as error:
        raise unfit(config, error) from error


def tried(maps: Sequence[LinearMap], config: Any) -> tuple[int, float]:
    """:func:`trial` of what can be tried without data.

    Raises:
        UsageError: it does not fit the layers.
    """
    start = start_of(config)
    if start == "corda" and any(m.weight.dim() > 2 for m in maps):
        raise UsageError(
            "adapter.config.init_lora_weights=corda: decomposes matrices alone; leave convolutions "
            "out of adapter.targets"
        )
    return trial(maps, plain_start(config) if start in LOOKING else config)


@dataclass(frozen=True)
class Fitted:
    """A configuration of the size that a budget asks for."""

    config: Any
    size: int
    count: int


def fitted(maps: Sequence[LinearMap], config: Any, size: str, wanted: int) -> Fitted:
    """The configuration whose ``size`` trains as near to ``wanted`` numbers as can be.

    Args:
        maps: the layers.
        config: of the adapter.
        size: which of its options says how large it is: a rank, a block, a number of entries.
        wanted: how many numbers shall train.

    Raises:
        UsageError: nothing comes near.
    """
    known: dict[int, int | None] = {}
    started: set[int] = set()  # the sizes at which outputs stay what they were

    def sized(n: int) -> Any:
        made = copy.deepcopy(plain_start(config))
        setattr(made, size, n)
        return made

    def count(n: int) -> int | None:
        if n not in known:
            try:
                known[n], change = trial(maps, sized(n))
            except UsageError:
                known[n], change = None, math.inf
            if change <= START:
                started.add(n)
        return known[n]

    widths = [side for m in maps for side in (m.in_features, m.out_features)]
    most, common = max(m.in_features * m.out_features for m in maps), math.gcd(*widths)
    # Ranks; numbers of entries; blocks, which must divide all widths.
    tried = (
        range(1, max(widths) + 1),
        [2**i for i in range(most.bit_length())],
        range(max(widths), most + 1),
        [n for n in range(1, common + 1) if common % n == 0],
    )
    for i, sizes in enumerate(tried):
        between = False
        if i == len(tried) - 1:
            for n in sizes:
                count(n)
        else:
            between = _bisect(count, sizes, wanted) and isinstance(sizes, range)
        if between or any(c and abs(c / wanted - 1) <= NEAR for c in known.values()):
            break

    def nearest(allowed: Collection[int]) -> int | None:
        counts = {n: c for n, c in known.items() if c and n in allowed}
        return min(counts, key=lambda n: (abs(math.log(counts[n] / wanted)), n), default=None)

    best = nearest(known)
    if best is not None and best not in started:  # reflections start in pairs
        count(best - 1), count(best + 1)
        best = nearest(started) if started else best
    found = {n: c for n, c in known.items() if c}
    if best is None or not 1 / FAR <= found[best] / wanted <= FAR:
        near = f"; the nearest is {size}={best}, which trains {found[best]:,}" if best else ""
        raise UsageError(
            f"adapter.budget: no {size} of {type(config).__name__} trains about {wanted:,} numbers "
            f"on these layers{near}; ask for another budget, or leave it out"
        )
    made = copy.deepcopy(config)
    setattr(made, size, best)
    return Fitted(made, best, found[best])


def _bisect(count: Callable[[int], int | None], sizes: Sequence[int], wanted: int) -> bool:
    """Count at the sizes around where the count crosses ``wanted``; it rises or falls with them.

    From the smallest size in doubling steps: what a size costs to try grows with it. A size that
    does not fit lies beyond. Returns whether two neighbours lie on both sides of ``wanted``.
    """
    while len(sizes) > 2 and count(sizes[0]) is None:
        sizes = sizes[1:]
    first = count(sizes[0])
    if first is None:
        return False

    def beyond(place: int) -> bool:
        here = count(sizes[place])
        return here is None or (here >= wanted) != (first >= wanted)

    low, high = 0, min(1, len(sizes) - 1)
    second = count(sizes[high])
    if second is not None and (second - first) * (wanted - first) < 0:
        return False
    while not beyond(high) and high < len(sizes) - 1:
        low, high = high, min(2 * high, len(sizes) - 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return low < high and beyond(high) and count(sizes[high]) is not None
