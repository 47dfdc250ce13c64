"""APER with adapters (Zhou et al., IJCV 2024; LAMDA-PILOT @ 5240714, models/aper_adapter.py).

Bottlenecks beside the MLPs of a frozen network learn the first task, by cross-entropy of scaled
cosines, and are frozen. A sample's features are those without and with them, [f(x), f_A(x)] (2 d,),
and classes are known by their means: logits are cosines of the joint vectors. ``aper`` is the
variant that tunes the whole network.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from cl_bench.blocks import Bottleneck, Bottlenecks, blocks_of
from cl_bench.contracts import CLASSIFIED, Batch, Learner, Needs, Task
from cl_bench.contracts.options import Count, PartShare, Rate
from cl_bench.strategies.analytic.cosine_start import CosineStart
from cl_bench.strategies.analytic.ncm import NCM
from cl_bench.strategies.blocks.prompting import hold_body


class APERAdapter(CosineStart, NCM):
    """Class means in the features of a frozen network without and with adapters.

    Args:
        epochs: of the first task; None takes the run's.
        r: width of a bottleneck.
        scale: of its output.
        dropout: share of a bottleneck that training leaves out.
    """

    needs = Needs(modalities=CLASSIFIED, shardable=False, freezes_weights=True, adapts=True)

    def __init__(
        self,
        epochs: Count | None = None,
        r: Count = 64,
        scale: Rate = 0.1,
        dropout: PartShare = 0.1,
    ) -> None:
        super().__init__()
        self.epochs = epochs
        self.r, self.scale, self.dropout = r, scale, dropout
        self._attached: Bottlenecks | None = None
        self._adapted = True

    @property
    def passes(self) -> int:
        """Without adapters, and with them."""
        return 2 if self.counts.numel() else 1

    @property
    def adapters(self) -> int:
        """The first task's."""
        return int(bool(self.counts.numel()))

    def check(self, learner: Learner) -> None:
        """The network must have blocks."""
        super().check(learner)
        blocks_of(learner, "APERAdapter")

    def modules(self, learner: Learner) -> Mapping[str, nn.Module]:
        """The adapters and, while the first task is learned, the factor of its cosines."""
        made = [
            Bottleneck(block.width, self.r, self.scale, self.dropout)
            for block in blocks_of(learner, "APERAdapter")
        ]
        return {"adapters": nn.ModuleList(made), **super().modules(learner)}

    def setup(self, learner: Learner, task: Task) -> None:
        """Freeze the network, and put the adapters there, which learn the first task alone."""
        hold_body(learner)
        if self.counts.numel():
            learner.hold(list(learner.extras(self).values()))
        self._attached = self._beside(learner)

    def _beside(self, learner: Learner) -> Bottlenecks:
        def shown() -> list[nn.Module] | None:
            own = cast(nn.ModuleList, learner.extras(self)["adapters"])
            return list(own) if self._adapted else None

        return Bottlenecks(blocks_of(learner, "APERAdapter"), shown)

    def read(self, learner: Learner, batch: Batch) -> Tensor:
        """Both features (n, 2 d)."""
        attached = self._attached or self._beside(learner)
        found = []
        try:
            for adapted in (False, True):
                self._adapted = adapted
                found.append(learner.features(batch))
        finally:
            self._adapted = True
            if attached is not self._attached:
                attached.remove()
        return torch.cat(found, dim=1)

    def release(self, learner: Learner) -> None:
        """The blocks are alone again."""
        if self._attached is not None:
            self._attached.remove()
        self._attached = None
