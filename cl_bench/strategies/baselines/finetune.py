"""Fine-tuning: every task is learned as if there had been no other.

The lower bound that forgetting is measured against.
"""

from cl_bench.contracts import LOCAL_OR_FEDERATED, FederatedStrategy, Needs


class Finetune(FederatedStrategy):
    """No restriction and no memory."""

    needs = Needs(engines=LOCAL_OR_FEDERATED)
    bound = "lower"
