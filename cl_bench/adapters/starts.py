"""LoRA's starts that look at a task's data: EVA and CorDA.

EVA (Paischer et al., 2024): A begins with the leading right singular vectors of each layer's
inputs, of one rank everywhere (rho = 1), B at zero. CorDA (Yang et al., NeurIPS 2024), by PEFT: a
pair is cut out of the weight by a decomposition that the inputs' covariance steers, and the weight
is left without it.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from cl_bench.adapters.attached import Attached, plain_start, whole_names
from cl_bench.contracts import Batch, Learner
from cl_bench.subspace import LinearMap


def from_data(
    learner: Learner, batches: Sequence[Batch], config: Any, maps: Sequence[LinearMap], name: str
) -> Attached:
    """The adapter on the layers, started from what they read in ``batches``."""
    if config.init_lora_weights == "eva":
        moments = learner.tap(maps, batches)
        attached = Attached(learner.network, maps, plain_start(config), name)
        with torch.no_grad():
            for m in maps:
                A = attached.layers[m.name].lora_A[name].weight
                leading = torch.linalg.eigh(moments[m.name].gram).eigenvectors.flip(1)[
                    :, : config.r
                ]
                A.copy_(leading.t().reshape(A.shape))
        return attached
    from peft.tuners.lora.corda import collect_eigens, crop_corda_eigens

    config = copy.deepcopy(config)
    config.target_modules = whole_names(maps)
    moments = learner.tap(maps, batches)
    modules: list[Any] = [m.module for m in maps]
    try:
        for m, module in zip(maps, modules, strict=True):
            module.covariance_matrix = (moments[m.name].gram / moments[m.name].rows).float()
            module.corda_method, module.rank = config.corda_config.corda_method, config.r
        collect_eigens(learner.network, config, verbose=False)
        crop_corda_eigens(learner.network, config)
        return Attached(learner.network, maps, config, name)
    finally:
        for module in modules:
            for left in ("covariance_matrix", "corda_method", "rank", "eigens"):
                vars(module).pop(left, None)
