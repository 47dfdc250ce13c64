"""What a forward pass keeps for the backward pass: estimated with tensors that hold no numbers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from cl_bench.contracts import Batch
from cl_bench.learners import BaseLearner


@dataclass(frozen=True)
class Activations:
    """Bytes of one process.

    Attributes:
        training: that a batch keeps until its backward pass, and the gradient of its outputs.
        evaluation: outputs of a batch that is scored.
        unknown: what could not be told, in words.
    """

    training: int = 0
    evaluation: int = 0
    unknown: tuple[str, ...] = ()


class _Kept:
    """Bytes of tensors that autograd saves, each storage once; weights are not among them."""

    def __init__(self, weights: set[int]) -> None:
        self.known = weights
        self.held: list[Tensor] = []
        self.total = 0

    def save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = _number(tensor)
        if key not in self.known:
            self.known.add(key)
            self.held.append(tensor)  # a storage that is freed gives its number to another
            self.total += storage.nbytes()
        return tensor


def estimate(
    learner: BaseLearner,
    batch: Batch,
    samples: int,
    scored: int,
    frozen: frozenset[str],
    precision: str,
) -> Activations:
    """What batches of this many samples keep, all as long as the stream makes the longest.

    Args:
        learner: whose network may be on the meta device.
        batch: one sample, as the stream gives it.
        samples: that a process learns at a time.
        scored: that it scores at a time.
        frozen: names of parameters that do not train.
        precision: of the Trainer.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _estimate(learner, batch, samples, scored, frozen, precision)
    except Exception as error:  # what a network makes of numbers that are not there is its own
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        return Activations(
            unknown=(f"activations, as the network looks at its numbers ({reason[:120]})",)
        )


def _estimate(
    learner: BaseLearner,
    batch: Batch,
    samples: int,
    scored: int,
    frozen: frozenset[str],
    precision: str,
) -> Activations:
    whole = {
        **{n: _stand_in(p, n not in frozen) for n, p in learner.named_parameters()},
        **{n: _stand_in(b, False) for n, b in learner.named_buffers()},
    }
    weights = {_number(t) for t in whole.values()}
    inputs = {k: torch.zeros(samples, *v.shape[1:], dtype=v.dtype) for k, v in batch.items()}
    kept, blocks = _Kept(weights), _Blocks(learner.blocks())
    blocks.kept = kept
    half = torch.bfloat16 if precision.startswith("bf16") else torch.float16
    with ExitStack() as inside:
        inside.enter_context(learner.longest())
        inside.enter_context(torch.enable_grad())
        inside.enter_context(torch.autograd.graph.saved_tensors_hooks(kept.save, lambda t: t))
        if not precision.startswith(("32", "64")):
            inside.enter_context(torch.autocast("cpu", dtype=half))
        inside.enter_context(blocks.watched())
        out, _ = torch.func.functional_call(_Whole(learner), _renamed(whole), (inputs,))
    if learner.recomputes:
        outside = kept.total - sum(blocks.inside)
        total = outside + sum(blocks.entering) + max(blocks.inside, default=0)
    else:
        total = kept.total
    outputs = out.numel() * out.element_size()
    return Activations(total + outputs, 2 * scored * outputs // max(samples, 1))


class _Whole(nn.Module):
    """Outputs and loss of a learner in one call."""

    def __init__(self, learner: BaseLearner) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        out = self.learner(batch)
        return out, self.learner.loss(out, batch)


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"learner.{name}": tensor for name, tensor in tensors.items()}


class _Blocks:
    """What enters each of a network's blocks, and what is kept inside it."""

    kept: _Kept

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = [b for b in blocks if not isinstance(b, nn.ModuleList | nn.ModuleDict)]
        self.entering: list[int] = []
        self.inside: list[int] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, every call of a block is noted."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            self.entering.append(0 if given is None else given.numel() * given.element_size())
            self.inside.append(-self.kept.total)

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self.inside[-1] += self.kept.total

        handles = [b.register_forward_pre_hook(enter, with_kwargs=True) for b in self.blocks]
        handles += [b.register_forward_hook(leave) for b in self.blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _number(tensor: Tensor) -> int:
    """Of a tensor's storage; another may have it once this one is gone."""
    ref = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    return int(ref.cdata)


def _stand_in(tensor: Tensor, trains: bool) -> Tensor:
    made = torch.empty(tensor.shape, dtype=tensor.dtype)
    return made.requires_grad_(trains and made.is_floating_point())
