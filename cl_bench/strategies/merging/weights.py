"""Which weights are merged, and as what."""

from collections.abc import Mapping

from torch import Tensor

from cl_bench.contracts import Learner


def matrices_of(learner: Learner) -> frozenset[str]:
    """Names of the weights that are matrices."""
    return frozenset(name for name, role in learner.roles().items() if role == "matrix")


def own_heads(learner: Learner) -> frozenset[str]:
    """Parameters of output heads, where there is more than one head."""
    heads = {name for name, role in learner.roles().items() if role == "head"}
    several = len({name.rpartition(".")[0] for name in heads}) > 1
    return frozenset(heads) if several else frozenset()


def running_names(weights: Mapping[str, Tensor]) -> list[str]:
    """Running statistics of batch normalisation."""
    return [n for n in weights if n.endswith(("running_mean", "running_var"))]
