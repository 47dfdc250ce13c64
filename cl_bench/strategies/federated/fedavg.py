"""Federated averaging (McMahan et al., AISTATS 2017): w <- w + mean over clients of (w_k - w).

Every task is learned as if there had been no other: what federated forgetting is measured against.
"""

from cl_bench.contracts import FederatedStrategy, Needs


class FedAvg(FederatedStrategy):
    """No restriction and no memory; the federation averages."""

    needs = Needs(engines=frozenset({"federated"}))
