"""Which layers a subspace of their inputs can guard, and which normalise."""

from collections.abc import Sequence

from torch import Tensor, nn

from cl_bench.contracts import UsageError
from cl_bench.parallel.batch_norm import BatchNorm
from cl_bench.subspace import LinearMap, bias_of

NORMS = (
    BatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def is_norm(module: nn.Module) -> bool:
    """Whether the module normalises; transformers' models bring classes of their own."""
    scale = getattr(module, "weight", None)
    called = type(module).__name__.removesuffix("Gated").endswith("Norm")
    own = called and isinstance(scale, Tensor) and scale.dim() == 1
    return isinstance(module, NORMS) or own


def require_guardable(network: nn.Module, layers: Sequence[LinearMap]) -> None:
    """Raise :class:`UsageError` if what a weight does is not what its layers' inputs tell.

    It must be a parameter, and whoever else holds it must use it in the same way and be among
    ``layers``; the table of an embedding, which ``protect.tied`` speaks of, may hold it too.
    """
    holders: dict[Tensor, list[tuple[str, nn.Module]]] = {}
    for name, module in network.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, []).append((name, module))
    by_module = {layer.module: layer for layer in layers}
    for layer in layers:
        own = {n for n, _ in layer.module.named_parameters(recurse=False, remove_duplicate=False)}
        needed = (layer.parameter, bias_of(layer.parameter))
        if not own.issuperset(needed if layer.augmented else needed[:1]):
            raise UsageError(
                f"layer {layer.name!r} computes its weight from other parameters (weight norm "
                "or the like): remove that, or leave the layer alone with "
                f"protect.exclude=[{layer.name}]"
            )
        for name, module in holders[layer.weight]:
            if module is layer.module or isinstance(module, nn.Embedding):
                continue
            other = by_module.get(module)
            both = f"layers {layer.name!r} and {name!r} share one weight"
            if other is None or not _alike(layer, other):
                raise UsageError(
                    f"{both} and use it in different ways, or only one of them is guarded: no one "
                    "subspace of inputs guards both; untie them, or name both or neither in "
                    "protect.include and protect.exclude"
                )
            if layer.augmented != other.augmented or (
                layer.augmented and layer.bias is not other.bias
            ):
                raise UsageError(
                    f"{both}, but not their bias, which protect.bias=augmented makes a part of it: "
                    "use protect.bias=frozen"
                )


def _alike(one: LinearMap, other: LinearMap) -> bool:
    """Whether two layers make the same matrix of one weight."""
    return (one.transposed, one.groups, one.in_features - one.augmented) == (
        other.transposed,
        other.groups,
        other.in_features - other.augmented,
    )
