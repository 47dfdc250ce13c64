"""Replay of the model's own answers.

When a task is learned, the model answers some of its prompts, and those answers, not the data's,
are learned again with every batch of later tasks: what is replayed is what the model says. After
Huang et al., "Mitigating Catastrophic Forgetting in Large Language Models with Self-Synthesized
Rehearsal" (ACL 2024, arXiv:2403.01244), whose latest model answers anew what is rehearsed; there
the prompts are synthesised too, by the base model from examples, and chosen for diversity. Here
they are prompts that were learned: no reproduction of that paper.
"""

import torch

from cl_bench.contracts import (
    Batch,
    Learner,
    Needs,
    Statistics,
    Strategy,
    Task,
    generator,
)
from cl_bench.contracts.options import Count, Strength
from cl_bench.strategies.replay.buffer import Reservoir, size


class SelfReplay(Reservoir, Strategy):
    """Replays what the model answered when old tasks were new.

    Args:
        memory: prompts kept with the model's answers, over all tasks.
        samples: prompts of a task that are answered.
        replay: of them, with every batch; None means as many as the batch holds.
        temperature: of the answers; 0 takes the likeliest token.
    """

    needs = Needs(modalities=frozenset({"text"}))

    def __init__(
        self,
        memory: Count = 500,
        samples: Count = 100,
        replay: Count | None = None,
        temperature: Strength = 0.0,
    ) -> None:
        super().__init__(memory)
        self.samples = samples
        self.replay = replay
        self.temperature = temperature

    @property
    def exemplars(self) -> int:
        """Prompts of old tasks that are kept."""
        return self.filled

    def setup(self, learner: Learner, task: Task) -> None:
        """Its own random numbers begin."""
        self.begin(learner.seed)

    def on_batch(self, learner: Learner, batch: Batch) -> Batch:
        """The batch, and prompts of old tasks with the model's own answers."""
        if not self.filled:
            return batch
        drawn = self.draw(self.replay or size(batch))
        return {k: torch.cat([v, drawn[k].to(v)]) for k, v in batch.items()}

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """Answer some of the task's prompts."""
        rng = generator(learner.seed, "own answers", task.index)
        asked = task.sample(self.samples, learner.seed)
        for part in torch.split(torch.arange(size(asked)), learner.batch_size):
            batch = {k: v[part] for k, v in asked.items()}
            self.offer(learner.own_answers(batch, self.temperature, rng))
