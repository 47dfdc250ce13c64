"""Fine-tuning: every task is learned as if there had been no other.

The lower bound that forgetting is measured against.
"""

from cl_bench.contracts import LOCAL_OR_FEDERATED, FederatedStrategy, Learner, Memory, Needs


class Finetune(FederatedStrategy):
    """No restriction and no memory."""

    needs = Needs(engines=LOCAL_OR_FEDERATED)
    bound = "lower"

    def footprint(self, learner: Learner, tasks: int, processes: int) -> Memory:
        """Nothing beside the network."""
        return Memory()
