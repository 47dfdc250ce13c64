"""A network's transformer blocks: which modules they are, and where their MLPs begin and end."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from cl_bench.contracts import Learner, UsageError

LAYOUTS = (
    ("layernorm_after", "mlp"),
    ("layernorm_after", "output.dense"),
    ("intermediate.dense", "output.dense"),
)
"""Of transformers' ViT, of older ones like it, and of BERT: what reads the hidden states that an
MLP's result is added to, and what gives that result. Blocks of ours name both in ``branch``."""


@dataclass(frozen=True)
class Block:
    """Attention and an MLP.

    Attributes:
        name: of the module in the network.
        module: maps hidden states (n, L, d), its first argument, to the next ones.
        reads: is given the hidden states (n, L, d) to which the MLP's result is added.
        writes: gives that result (n, L, d).
        width: d.
    """

    name: str
    module: nn.Module
    reads: nn.Module
    writes: nn.Module
    width: int


def blocks_of(learner: Learner, who: str) -> list[Block]:
    """The network's blocks, from the input upwards.

    Args:
        learner: whose network it is.
        who: wants to put something into them.

    Raises:
        UsageError: it has none like ViT's or BERT's.
    """
    found = list(_found(learner.network))
    if not found:
        kinds = sorted({type(part).__name__ for part in learner.blocks()})
        raise UsageError(
            f"{who} works inside transformer blocks like those of ViT or BERT, and this network is "
            f"made of {', '.join(kinds) or type(learner.network).__name__}: use model=vit_tiny, "
            "model=minilm, or a ViT or BERT by model=encoder"
        )
    return found


def _found(network: nn.Module) -> Iterator[Block]:
    for name, module in network.named_modules():
        own = getattr(module, "branch", None)
        for places in [own] if isinstance(own, tuple) else LAYOUTS:
            reads, writes = (_part(module, place) for place in places)
            if reads is not None and writes is not None and isinstance(reads.weight, Tensor):
                yield Block(name, module, reads, writes, reads.weight.shape[-1])
                break


def _part(module: nn.Module, place: str) -> nn.Module | None:
    try:
        return module.get_submodule(place)
    except AttributeError:
        return None
