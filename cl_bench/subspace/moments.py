"""Second moments of layer inputs, C = X X^T: the one statistic the projection family lives on.

C adds up over batches, processes and clients. While fewer inputs than dimensions have been seen
the inputs themselves are kept, and the n x n Gram is decomposed instead of the d x d one
(milliseconds instead of seconds at d = 2048).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cl_bench.subspace.basis import RESOLUTION
from cl_bench.subspace.experts import INTO, call_of, hidden_units, is_experts
from cl_bench.subspace.linear_maps import LinearMap, first_uses

DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
UNDROPPED = "_cl_bench_undropped"
"""Attribute of what leaves a dropout layer: what entered it."""


class Moments:
    """Accumulates the second moments of d-dimensional inputs in float64.

    Args:
        dim: d.
        limit: samples that a tap takes in at most, the first ones; None means all.

    Attributes:
        dim: d.
        limit: as given.
        rows: input vectors seen (a convolution sees one per patch).
        samples: samples they came from.
        energy: tr C = ||X||_F^2.
    """

    def __init__(self, dim: int, limit: int | None = None) -> None:
        self.dim = dim
        self.limit = limit
        self.rows = 0
        self.samples = 0
        self.energy = 0.0
        self._inputs: list[Tensor] | None = []
        self._gram: Tensor | None = None
        self._floor = RESOLUTION**2

    def add(self, x: Tensor, samples: int = 0) -> None:
        """Take in the rows of ``x`` (n, d), which came from ``samples`` samples."""
        x = x.detach()
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        self.rows += x.shape[0]
        self.samples += samples
        self.energy += float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
        if self._inputs is not None and self.rows < self.dim:
            self._inputs.append(x.to(torch.float64, copy=True))  # x may be overwritten later
            return
        self._to_gram(x.device)
        assert self._gram is not None
        self._gram += (x.t() @ x).double()
        if x.dtype == torch.float32:
            # A Gram squares the condition number: below this, float32 products hold only noise.
            self._floor = max(self._floor, torch.finfo(torch.float32).eps)

    def _to_gram(self, device: torch.device) -> None:
        if self._gram is None:
            self._gram = torch.zeros(self.dim, self.dim, dtype=torch.float64, device=device)
        for x in self._inputs or ():
            self._gram += x.t() @ x
        self._inputs = None

    def __add__(self, other: Self) -> Self:
        """Moments of both sets of inputs together: over ranks, over clients."""
        total = type(self)(self.dim)
        total.rows = self.rows + other.rows
        total.samples = self.samples + other.samples
        total.energy = self.energy + other.energy
        total._floor = max(self._floor, other._floor)
        if self._inputs is not None and other._inputs is not None and total.rows < self.dim:
            total._inputs = self._inputs + other._inputs
        else:
            total._inputs, total._gram = None, self.gram + other.gram
        return total

    def all_reduce(self) -> None:
        """Become the moments of the inputs that all processes of ``torch.distributed`` saw."""
        device = self.gram.device if self._inputs is None else self._stacked().device
        facts = torch.tensor(
            [self.rows, self.samples, self.energy, self._inputs is None, self._floor],
            dtype=torch.float64,
            device=device,
        )
        everyones = [torch.empty_like(facts) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, facts)
        rows = [int(of[0]) for of in everyones]
        few = sum(rows) < self.dim and not any(bool(of[3]) for of in everyones)
        if few:
            mine = torch.zeros(max(rows), self.dim, dtype=torch.float64, device=device)
            mine[: self.rows] = self._stacked()
            padded = [torch.empty_like(mine) for _ in everyones]
            dist.all_gather(padded, mine)
            self._inputs = [x[:n] for x, n in zip(padded, rows, strict=True) if n]
        else:
            self._gram, self._inputs = self.gram.clone(), None
            dist.all_reduce(self._gram)
        self.rows, self.samples = sum(rows), sum(int(of[1]) for of in everyones)
        self.energy = float(sum(of[2] for of in everyones))
        self._floor = max(float(of[4]) for of in everyones)

    @property
    def gram(self) -> Tensor:
        """C (d, d), float64."""
        if self._gram is not None:
            return self._gram
        x = self._stacked()
        return x.t() @ x

    def _stacked(self) -> Tensor:
        return torch.cat(self._inputs) if self._inputs else torch.zeros(0, self.dim).double()

    def energy_along(self, directions: Tensor) -> Tensor:
        """||m_i^T X||^2 for every column m_i of ``directions`` (d, k); shape (k,)."""
        if self._inputs is not None:
            x = self._stacked()
            return (x @ directions.to(x)).square().sum(0)
        directions = directions.to(self.gram)
        return (directions * (self.gram @ directions)).sum(0)

    def principal(self, outside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Squared singular values and left singular vectors of X, or of (I - M M^T) X.

        Args:
            outside: orthonormal M (d, k) whose span is taken out first.

        Returns:
            ``(S2, U)``: energies (r,), descending, and directions (d, r), orthonormal, float64.
            Directions that carry only rounding error are left out, so r is the numerical rank.
        """
        seen = self._stacked() if self._inputs is not None else self.gram
        basis = None if outside is None or outside.shape[1] == 0 else outside.to(seen)
        if self._inputs is not None:
            x = _remove(seen, basis)
            energies, v = torch.linalg.eigh(x @ x.t())
            energies, v = self._above_rounding(energies, v)
            directions = (x.t() @ v).div_(energies.sqrt())
        else:
            gram = _remove(_remove(seen, basis).t(), basis)
            gram = (gram + gram.t()).div_(2)
            energies, directions = self._above_rounding(*torch.linalg.eigh(gram))
        return energies, directions

    def _above_rounding(self, energies: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Of ascending eigenvalues and their vectors, those that are no noise; descending."""
        floor = self._floor * max(self.energy, torch.finfo(torch.float64).tiny)
        noise = int((energies <= floor).sum())
        return energies[noise:].flip(0), vectors[:, noise:].flip(1)


def _remove(rows: Tensor, basis: Tensor | None) -> Tensor:
    """Rows without their part in span(basis); twice, since once leaves rounding behind."""
    if basis is None:
        return rows
    rows = torch.addmm(rows, rows @ basis, basis.t(), alpha=-1)
    return rows.addmm_(rows @ basis, basis.t(), alpha=-1)


class Accumulator(Protocol):
    """What a layer's inputs can be added to."""

    samples: int

    def add(self, x: Tensor, samples: int = 0) -> None:
        """Take in the rows of ``x`` (n, d)."""


class Tapped(dict[str, Any]):
    """Moments, or other accumulators, by layer name.

    Attributes:
        counted: for a layer's name, bool (n, L): which positions of the batch under way count in
            its inputs. None, and None for a layer, counts all.
    """

    def __init__(self, accumulators: Mapping[str, Any]) -> None:
        super().__init__(accumulators)
        self.counted: Callable[[str], Tensor | None] | None = None
        self._batch: int | None = None  # its samples; None: every call is a batch of its own
        self._rooms: dict[Any, int] = {}  # how many of the batch's samples an accumulator takes

    def begin(self, samples: int, counted: Callable[[str], Tensor | None] | None = None) -> None:
        """A batch of so many samples comes: all calls of a layer until the next one see them."""
        self._batch, self.counted, self._rooms = samples, counted, {}

    def of(self, x: Tensor, layer: str) -> Tensor:
        """What a layer's accumulator takes of one call's inputs (n, ..., d), as far as they count.

        The inputs of the batch's first samples, up to its limit: of a call with n inputs for every
        sample those n; of one whose inputs belong to no sample (positions, say) all.
        """
        taken, batch = self[layer], len(x) if self._batch is None else self._batch
        if self._batch is None or taken not in self._rooms:
            limit: int | None = getattr(taken, "limit", None)
            left = batch if limit is None else max(0, limit - taken.samples)
            self._rooms[taken] = min(batch, left)
            taken.samples += self._rooms[taken]
        room = self._rooms[taken]
        counted = None if self.counted is None else self.counted(layer)
        if counted is not None and x.dim() == 2 and len(x) == counted.numel():
            x = x.view(*counted.shape, -1)  # routers and experts are given tokens in one row
        if counted is not None and x.shape[:2] == counted.shape:
            return x[:room][counted[:room]]
        whole = room == batch or len(x) % batch
        return x if whole and room else x[: room * (len(x) // batch)]


@contextmanager
def dropping(network: nn.Module) -> Iterator[None]:
    """While the context is open dropout is on, and a tap sees what enters a layer's own dropout."""
    dropouts = [m for m in network.modules() if isinstance(m, DROPOUTS)]
    before = [(m, m.training, m.inplace) for m in dropouts]

    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        setattr(out, UNDROPPED, args[0])

    handles = [m.register_forward_hook(hook) for m in dropouts]
    try:
        for m in dropouts:
            m.training, m.inplace = True, False
        yield
    finally:
        for handle in handles:
            handle.remove()
        for m, training, inplace in before:
            m.training, m.inplace = training, inplace


@contextmanager
def tapped(
    layers: Sequence[LinearMap], into: Mapping[str, "Accumulator"] | None = None
) -> Iterator[Tapped]:
    """While the context is open, every forward pass adds the layers' inputs to their moments.

    Args:
        layers: whose inputs; those that share a weight, or read what another reads, share the
            accumulator of the first one.
        into: other accumulators than moments, by layer name.

    Yields:
        ``{layer name: accumulator}``, filled as forward passes happen.
    """
    moments = Tapped(into or {layer.name: Moments(layer.in_features) for layer in layers})
    by_module: dict[nn.Module, list[LinearMap]] = {}
    for layer, first in zip(layers, first_uses(layers), strict=True):
        if layer.reads is None:
            by_module.setdefault(layer.module, []).append(layer)
        moments[layer.name] = moments[layer.reads or first.name]

    def take(layer: LinearMap, seen: Tensor) -> None:
        if len(seen):
            for rows in layer.inputs(seen):
                moments[layer.name].add(rows)

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = getattr(args[0], UNDROPPED, args[0]).detach()
        for layer in by_module[module]:
            take(layer, moments.of(x, layer.name))

    def routed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens, index = call_of(args, kwargs)
        places = torch.arange(len(tokens), device=tokens.device)[:, None]
        for layer in by_module[module]:
            counted = moments.of(places, layer.name)[..., 0].flatten()
            own = tokens.detach()[counted[(index[counted] == layer.group).any(1)]]
            into = layer.parameter in INTO or not len(own)
            take(layer, own if into else hidden_units(module, own, layer.group))

    handles = [
        module.register_forward_pre_hook(routed, with_kwargs=True)
        if is_experts(module)
        else module.register_forward_pre_hook(hook)
        for module in by_module
    ]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()
