"""Which layers get adapters: by what they do in a forward pass, or by name."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from cl_bench.contracts import Learner, Protect, UsageError
from cl_bench.contracts.options import shown
from cl_bench.subspace import LinearMap

KINDS = ("linear", "attention", "mlp", "conv")
"""All linear layers; those around attention (queries, keys, values and what reads its result); the
other linear ones; convolutions. Output heads are none of these."""

READ = ("ScaledDotProduct", "Softmax", "SafeSoftmax")
"""What autograd's names of attention's own operations begin with."""


def chosen(
    learner: Learner, wanted: Sequence[str], option: str = "adapter.targets"
) -> list[LinearMap]:
    """The layers that ``wanted`` names, each by a kind or by a shell pattern of its whole name.

    Args:
        learner: whose.
        wanted: kinds and patterns.
        option: what messages call it.

    Raises:
        UsageError: one of them names no layer, or one whose weight is an embedding's too.
    """
    maps: dict[str, LinearMap] = {}
    for m in learner.layers(Protect(bias="free", heads="never")):
        maps.setdefault(m.name.partition("#")[0], m)
    conv = {n for n, m in maps.items() if isinstance(m.module, nn.Conv1d | nn.Conv2d)}
    by_kind = {"linear": set(maps) - conv, "conv": conv}
    if {"attention", "mlp"} & set(wanted):
        by_kind["attention"] = attending(learner, [maps[n] for n in sorted(by_kind["linear"])])
        by_kind["mlp"] = by_kind["linear"] - by_kind["attention"]
    found: set[str] = set()
    for one in wanted:
        mine = by_kind[one] if one in KINDS else {n for n in maps if fnmatchcase(n, one)}
        if not mine:
            raise UsageError(
                f"{option}={shown(list(wanted))}: {one!r} is no layer of this network; "
                f"name kinds ({', '.join(KINDS)}) or shell patterns of whole names, which are "
                f"{', '.join(maps) or 'none'}"
            )
        found |= mine
    require_untied(learner, [maps[n] for n in sorted(found)], option)
    return [m for n, m in maps.items() if n in found]


def require_untied(learner: Learner, maps: Sequence[LinearMap], option: str) -> None:
    """Raise :class:`UsageError` if a layer's weight is an embedding's too."""
    tied = {id(e.weight) for e in learner.embeddings()}
    for m in maps:
        if id(m.weight) in tied:
            raise UsageError(
                f"{option}: layer {m.name} shares its weight with an embedding, which an "
                "adapter would change too: leave it out"
            )


def attending(learner: Learner, maps: Sequence[LinearMap]) -> set[str]:
    """Names of the layers that attention reads, or that read it, with no other layer between."""
    batch = learner.example()
    inputs: dict[str, list[Any]] = {m.name: [] for m in maps}
    outputs: dict[Any, str] = {}
    with ExitStack() as within:
        within.enter_context(learner.evaluating())
        within.enter_context(torch.enable_grad())
        within.enter_context(_everything_learns(learner.network))
        for m in maps:
            handle = m.module.register_forward_hook(_noting(m.name, inputs, outputs))
            within.callback(handle.remove)
        out = learner(batch)
    return _around_attention(out.grad_fn, inputs, outputs)


def _noting(
    name: str, inputs: dict[str, list[Any]], outputs: dict[Any, str]
) -> Callable[..., None]:
    def note(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        inputs[name].append(given[0].grad_fn)
        outputs[out.grad_fn] = name

    return note


@contextmanager
def _everything_learns(network: nn.Module) -> Iterator[None]:
    """Inside, every operation is in autograd's graph."""
    frozen = [p for p in network.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _around_attention(end: Any, inputs: dict[str, list[Any]], outputs: dict[Any, str]) -> set[str]:
    found: set[str] = set()
    for node in _upwards(end, lambda node: False):
        own, weighs = _is_attention(node), _weighs_values(node, outputs)
        if own or weighs:
            found |= {outputs[n] for n in _nearest(node, outputs) if n in outputs}
    for name, starts in inputs.items():
        reads = [n for start in starts for n in (_nearest(start, outputs, itself=True))]
        if any(_is_attention(n) for n in reads):
            found.add(name)
    return found


def _is_attention(node: Any) -> bool:
    return node is not None and node.name().lstrip("_").startswith(READ)


def _weighs_values(node: Any, outputs: dict[Any, str]) -> bool:
    """Whether the node multiplies what a softmax gives with something else."""
    if not node.name().startswith("Bmm"):
        return False
    sides = [parent for parent, _ in node.next_functions if parent is not None]
    return any(
        {_is_attention(n) for n in _nearest(side, outputs, itself=True)} == {True} for side in sides
    )


def _nearest(node: Any, outputs: dict[Any, str], itself: bool = False) -> set[Any]:
    """Layers' outputs and attentions upstream of a node, with nothing of the kind between."""

    def stops(n: Any) -> bool:
        return (n is not node or itself) and (n in outputs or _is_attention(n))

    return {n for n in _upwards(node, stops) if stops(n)}


def _upwards(node: Any, stops: Callable[[Any], bool]) -> Iterator[Any]:
    """The graph's nodes from one on against the direction of computing, not beyond some."""
    waiting, known = [node] if node is not None else [], set()
    while waiting:
        node = waiting.pop()
        if node in known:
            continue
        known.add(node)
        yield node
        if not stops(node):
            waiting += [parent for parent, _ in node.next_functions if parent is not None]
