"""Surgery of gradients: what a step follows where new samples and old tasks disagree.

The gradients are rows of J; what TorchJD's aggregators make of them are weights w of J^T w that
follow from the Gramian J J^T: UPGrad and DualProj (Quinton & Rey, 2024, arXiv:2406.16232), PCGrad
(Yu et al., NeurIPS 2020), MGDA (Desideri, 2012), CAGrad (Liu et al., NeurIPS 2021), Aligned-MTL
(Senushkin et al., CVPR 2023), IMTL-G (Liu et al., ICLR 2021). ``orthogonal`` is ODICE's (Mao et
al., ICLR 2024): g + strength (h - (<h, g> / |g|^2) g), h the mean of the others.
"""

from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from cl_bench.contracts import Learner, UsageError
from cl_bench.contracts.options import Inherited, OnlyWith, Range, Strength
from cl_bench.strategies.surgery.second import Gradients, SecondObjectives, parts, product

Aggregator = Literal[
    "upgrad",
    "dualproj",
    "pcgrad",
    "mgda",
    "cagrad",
    "aligned_mtl",
    "imtl_g",
    "mean",
    "orthogonal",
]

CLASSES = {
    "upgrad": "UPGradWeighting",
    "dualproj": "DualProjWeighting",
    "pcgrad": "PCGradWeighting",
    "mgda": "MGDAWeighting",
    "cagrad": "CAGradWeighting",
    "aligned_mtl": "AlignedMTLWeighting",
    "imtl_g": "IMTLGWeighting",
    "mean": "MeanWeighting",
}
"""Of TorchJD: what makes weights of a Gramian."""

TINY = 1e-30


class Surgery(SecondObjectives):
    """One direction out of the batch's gradient and those of old tasks.

    Args:
        aggregator: how; all but ``orthogonal`` are TorchJD's.
        c: of ``cagrad``, how far from the mean the direction may lie.
        strength: of ``orthogonal``, how much of the others is added.
        scope: one Gramian over all parameters (``global``), or one for each (``layer``).
        shared: as in :class:`SecondObjectives`.

    Raises:
        UsageError: TorchJD, or what one of its aggregators needs, is not installed.
    """

    def __init__(
        self,
        aggregator: Aggregator = "upgrad",
        c: Annotated[float, Range(least=0), OnlyWith("aggregator", ("cagrad",))] = 0.5,
        strength: Annotated[Strength, OnlyWith("aggregator", ("orthogonal",))] = 1.0,
        scope: Literal["global", "layer"] = "global",
        **shared: Inherited,
    ) -> None:
        super().__init__(**shared)
        self.aggregator = aggregator
        self.c = c
        self.strength = strength
        self.scope = scope
        self.weighting: Any = None if aggregator == "orthogonal" else _weighting(aggregator, c)

    def constrain(self, learner: Learner) -> None:
        """G <- J^T w."""
        main, others = self.main(learner), self.others(learner)
        if not others:
            return
        rows = [main, *others]
        for part in parts(main, self.scope):
            weights = self.weights([{n: row[n] for n in part} for row in rows])
            for n in part:
                joined = torch.stack([row[n] for row in rows])
                main[n].copy_(torch.tensordot(weights.to(joined), joined, dims=1))

    def weights(self, rows: list[Gradients]) -> Tensor:
        """W (m,) of J^T w, the batch's gradient first."""
        gramian = torch.stack([torch.stack([product(a, b) for b in rows]) for a in rows]).double()
        if self.weighting is None:
            count = len(rows) - 1
            share = gramian[0, 1:].mean() / gramian[0, 0].clamp_min(TINY)
            own = (1 - self.strength * share).reshape(1)
            return torch.cat([own, gramian.new_full((count,), self.strength / count)])
        if not gramian.diagonal().any():
            return gramian.new_full((len(rows),), 1 / len(rows))
        # PCGrad draws an order from torch's own generator, which differs between processes.
        seed = int(torch.randint(1 << 31, (), generator=self.rng))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            found: Tensor = self.weighting(gramian)
        return found


def _weighting(aggregator: str, c: float) -> Any:
    try:
        from torchjd import aggregation

        kind = getattr(aggregation, CLASSES[aggregator])
        return kind(c=c) if aggregator == "cagrad" else kind()
    except ImportError as error:
        extra = "'torchjd[cagrad]'" if aggregator == "cagrad" else "'cl_bench[surgery]'"
        raise UsageError(
            f"strategy.aggregator={aggregator} needs a package that is not installed: pip install "
            f"{extra}, or use strategy.aggregator=orthogonal"
        ) from error
