"""Fine-tuning: every task is learned as if there had been no other.

The lower bound that forgetting is measured against.
"""

from cl_bench.contracts import Needs, Strategy


class Finetune(Strategy):
    """No restriction and no memory."""

    needs = Needs(engine="any")
    bound = "lower"
