"""Sequential low-rank adaptation ("SeqLoRA"), the baseline of O-LoRA (Wang et al., 2023).

One pair (A, B) is trained through all tasks, W = W_0 + alpha / r B A, and nothing is protected.
"""

from collections.abc import Mapping

from cl_bench.adapters import Adapted
from cl_bench.contracts import Learner, State, Statistics, Task
from cl_bench.strategies.lowrank.pairs import LowRankPairs


class SeqLoRA(LowRankPairs):
    """One low-rank pair for all tasks.

    Between tasks the pair is merged, as with every strategy of this family; the first weights are
    kept, so that it goes on from where it was.
    """

    lasting = ("shared", "keep")

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """Remember the pair."""
        Adapted.consolidate(self, learner, task, stats)

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Rank of what the pair adds."""
        return {name: {"lora_rank": self.rank} for name in self.first}

    def state_dict(self) -> State:
        """W_0 and the pair."""
        return Adapted.state_dict(self)

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        Adapted.load_state_dict(self, state)
