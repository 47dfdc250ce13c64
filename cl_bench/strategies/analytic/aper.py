"""APER (Zhou et al., IJCV 2024; LAMDA-PILOT @ 5240714, models/aper_finetune.py).

A copy of the pre-trained network learns the first task and is frozen. A sample's features are those
of both, [f_pretrained(x), f_tuned(x)] (2 d,), and classes are known by their means: logits are
cosines of the joint vectors, in which the longer half counts more.

This is the variant whose copy is tuned as a whole ("finetune"); ``aper_adapter`` tunes adapters.
The network's first weights are kept by name, so ``adapter=...`` in their place is refused.
"""

import torch
from torch import Tensor

from cl_bench.contracts import CLASSIFIED, Batch, Learner, Needs, State, Task
from cl_bench.contracts.learner import Snapshot
from cl_bench.contracts.options import Count
from cl_bench.strategies.analytic.cosine_start import CosineStart
from cl_bench.strategies.analytic.ncm import NCM


class APER(CosineStart, NCM):
    """Class means in the features of two networks: as it was, and as the first task made it.

    Args:
        epochs: of the first task; None takes the run's.

    Attributes:
        first: weights and buffers of the pre-trained network; empty before any task.
    """

    needs = Needs(modalities=CLASSIFIED, shardable=False, own_weights=True)

    def __init__(self, epochs: Count | None = None) -> None:
        super().__init__()
        self.epochs = epochs
        self.first: dict[str, Tensor] = {}
        self._pretrained: Snapshot | None = None

    @property
    def passes(self) -> int:
        """Through both networks."""
        return 2 if self.first else 1

    def setup(self, learner: Learner, task: Task) -> None:
        """Keep the network as it comes, once."""
        if not self.first:
            self.first = {k: v.detach().clone() for k, v in learner.weights().items()}

    def read(self, learner: Learner, batch: Batch) -> Tensor:
        """Both features (n, 2 d)."""
        if self._pretrained is None:
            now = {k: v.detach().clone() for k, v in learner.weights().items()}
            learner.load_weights({k: self.first.get(k, v) for k, v in now.items()})
            self._pretrained = learner.snapshot()
            learner.load_weights(now)
        return torch.cat([self._pretrained.features(batch), learner.features(batch)], dim=1)

    def state_dict(self) -> State:
        """The sums, and the network as it was."""
        return {**super().state_dict(), "first": dict(self.first)}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.first, self._pretrained = dict(state["first"]), None
