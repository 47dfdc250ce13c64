"""One gradient for every sample of a batch."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from cl_bench.contracts import Batch, held_at_once


def within_the_batch(
    parameters: Mapping[str, nn.Parameter],
    out: Tensor,
    batch: Batch,
    value: Callable[[Tensor, Batch], Tensor],
    squares: bool = False,
) -> dict[str, Tensor]:
    """Gradients of each sample's value where the others of the batch have a part in it.

    Or the sum of their squares, for which of a large network no two are held.
    """
    weights = sum(p.numel() for p in parameters.values())
    if squares and held_at_once(weights, len(out)) == len(out):
        return squares_of(within_the_batch(parameters, out, batch, value))
    held = () if squares else (len(out),)
    found = {name: p.new_zeros(*held, *p.shape) for name, p in parameters.items()}
    for i in range(len(out)):
        own = value(out[i : i + 1], {k: v[i : i + 1] for k, v in batch.items()})
        gradients = torch.autograd.grad(
            own, list(parameters.values()), retain_graph=i + 1 < len(out), allow_unused=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None and squares:
                found[name].addcmul_(gradient, gradient)
            elif gradient is not None:
                found[name][i] = gradient
    return found


def squares_of(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over samples of squares of their gradients (n, ...), which are let go of."""
    return {name: gradients.pop(name).square_().sum(0) for name in list(gradients)}


class _Objective(nn.Module):
    """A function of a network as a module, so that ``functional_call`` can vary its parameters."""

    def __init__(self, network: nn.Module, value: Callable[[Batch], Tensor]) -> None:
        super().__init__()
        self.network = network
        self.value = value

    def forward(self, sample: Batch) -> Tensor:
        return self.value({name: v.unsqueeze(0) for name, v in sample.items()})


def per_sample_gradients(
    network: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    value: Callable[[Batch], Tensor],
    batch: Batch,
) -> dict[str, Tensor]:
    """Gradients (n, ...) of each sample's value, by parameter, where no other has a part in it."""
    objective = _Objective(network, value)

    def of(varied: dict[str, Tensor], sample: Batch) -> Tensor:
        result: Tensor = functional_call(objective, varied, (sample,))
        return result

    detached = {f"network.{name}": p.detach() for name, p in parameters.items()}
    try:
        found = vmap(grad(of), in_dims=(None, 0))(detached, batch)
    except RuntimeError:
        # Some modules have no batching rule (GRU, writes in place, branches on values): the same
        # gradients, sample by sample. What is wrong with the network itself is raised again there.
        return _one_by_one(parameters, value, batch)
    return {name.removeprefix("network."): g.detach() for name, g in found.items()}


def _one_by_one(
    parameters: Mapping[str, nn.Parameter], value: Callable[[Batch], Tensor], batch: Batch
) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for i in range(len(next(iter(batch.values())))):
        out = value({name: v[i : i + 1] for name, v in batch.items()})
        gradients = torch.autograd.grad(out, list(parameters.values()), allow_unused=True)
        for (name, p), g in zip(parameters.items(), gradients, strict=True):
            found[name].append(torch.zeros_like(p) if g is None else g)
    return {name: torch.stack(gradients) for name, gradients in found.items()}
