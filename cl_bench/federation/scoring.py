"""Scores of the global model, class by class too."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_bench.experiment.loader import EvalLoader
from cl_bench.learners import BaseLearner


class ByClass:
    """Scores loaders without a Trainer.

    Args:
        learner: with the global weights.
        device: where it lives.

    Attributes:
        scores: of every class (C,) of the tasks scored last, by task; NaN where there is no sample.
    """

    def __init__(self, learner: BaseLearner, device: str) -> None:
        self.learner = learner
        self.device = device
        self.scores: dict[int, Tensor] = {}

    def test(self, loaders: Sequence[EvalLoader]) -> None:
        """Score the data of every test that the learner expects."""
        learner = self.learner
        learner.eval()
        self.scores = {}
        for i, (task, loader) in enumerate(zip(learner.test_tasks, loaders, strict=True)):
            right = torch.zeros(len(task.classes), dtype=torch.float64)
            count = torch.zeros(len(task.classes), dtype=torch.float64)
            with torch.no_grad():
                for batch in loader:
                    batch = {name: value.to(self.device) for name, value in batch.items()}
                    score = learner.test_step(batch, 0, i).double().cpu()
                    label = batch["y"].cpu() - task.classes.start
                    right.index_add_(0, label, score)
                    count.index_add_(0, label, torch.ones_like(score))
            # The tasks' own data come first, then probes.
            self.scores.setdefault(task.index, right / count)
