"""What each parameter of a network is for: optimizers and penalties treat them differently."""

from collections.abc import Callable

from torch import Tensor, nn

from cl_bench.contracts.learner import Role
from cl_bench.subspace import linear_maps


def roles(
    network: nn.Module, is_norm: Callable[[nn.Module], bool], heads: frozenset[Tensor]
) -> dict[str, Role]:
    """The role of every parameter, by name; one that several modules share has one name.

    Args:
        network: any.
        is_norm: whether a module normalises.
        heads: the parameters of output heads.
    """
    found: dict[str, Role] = {}
    tables = {m.weight for m in network.modules() if isinstance(m, nn.Embedding)}
    matrices: set[object] = set()
    for module in network.modules():
        matrices |= {layer.weight for layer in linear_maps("", module) if not layer.stacked}
        if not is_norm(module):  # attention and recurrent layers keep matrices of their own
            own = module.named_parameters(recurse=False)
            matrices |= {p for name, p in own if "weight" in name and p.dim() > 1}
    for name, parameter in network.named_parameters():
        if parameter in tables:
            found[name] = "embedding"
        elif parameter in heads:
            found[name] = "head"
        else:
            found[name] = "matrix" if parameter in matrices else "vector"
    return found
