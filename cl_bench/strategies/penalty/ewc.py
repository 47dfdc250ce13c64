"""Elastic Weight Consolidation (Kirkpatrick et al., PNAS 2017).

Old tasks pull every weight back in proportion to its Fisher information:
L = L_t + lambda / 2 * sum_j sum_i F_j,i (theta_i - theta_j,i)^2 over old tasks j   (Eq. 3, summed).
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from torch import Tensor

from cl_bench.contracts import (
    LOCAL_OR_FEDERATED,
    Batch,
    FederatedStrategy,
    Learner,
    Memory,
    Needs,
    State,
    Statistics,
    Task,
    UsageError,
    generator,
    held_at_once,
    split_batch,
)
from cl_bench.contracts.options import Count, OnlyWith, Share, Strength
from cl_bench.subspace import added_up, as_rows, joined, own_rows, rows_of


class EWC(FederatedStrategy):
    """Quadratic penalty on the diagonal of the Fisher information.

    The sum over old tasks is one quadratic, with F = sum F_j and centre
    theta* = sum F_j theta_j / F (its constant has no gradient): memory does not grow with tasks.
    Much published code keeps another quadratic, around the latest weights and with the mean of the
    F_j: ``anchor: latest, information: mean, fisher: batched`` (for example github.com/joansj/hat
    @ ed35d72, whose batches are of 20).

    Args:
        strength: lambda.
        samples: training samples that estimate the Fisher information of a task.
        fisher: squared gradients of single samples (in batches of 64, where the network normalises
            by the batch; of a network above 4 million weights fewer are in memory at once) with
            labels drawn from the model's own prediction (``true``) or the data's (``empirical``);
            or of the mean loss of small batches with the data's (``batched``), about
            1 / ``fisher_batch`` of the second.
        fisher_batch: samples of such a batch.
        information: F of old tasks is the ``sum`` of theirs (Kirkpatrick et al.) or the ``mean``
            over all of them, those before a head took part included.
        anchor: pull to where the ``sum`` of the tasks' own quadratics is least (Kirkpatrick et
            al.), or to the ``latest`` weights (Huszár, PNAS 2018; Schwarz et al.).
        decay: gamma in [0, 1] on old information at each new task, with ``information: sum``
            (online EWC, Schwarz et al., ICML 2018, which has ``anchor: latest``).

    Raises:
        UsageError: an option is out of range.
    """

    needs = Needs(engines=LOCAL_OR_FEDERATED, gathers=True)

    def __init__(
        self,
        strength: Strength = 100.0,
        samples: Count = 1000,
        fisher: Literal["true", "empirical", "batched"] = "true",
        fisher_batch: Annotated[Count, OnlyWith("fisher", ("batched",))] = 20,
        information: Literal["sum", "mean"] = "sum",
        anchor: Literal["sum", "latest"] = "sum",
        decay: Share = 1.0,
    ) -> None:
        if decay != 1.0 and information == "mean":
            raise UsageError(
                f"strategy.decay={decay}: a mean over tasks does not fade; use "
                "strategy.information=sum, or decay=1"
            )
        self.strength = strength
        self.samples = samples
        self.fisher = fisher
        self.fisher_batch = fisher_batch
        self.merging = information
        self.anchor = anchor
        self.decay = decay
        self.tasks = 0
        self.information: dict[str, Tensor] = {}
        self.centre: dict[str, Tensor] = {}

    def footprint(self, learner: Learner, tasks: int, processes: int) -> Memory:
        """F and theta*; what the penalty keeps of each; a sum of squares, and whole gradients."""
        trained = sum(p.numel() * p.element_size() for p in learner.trainable_parameters())
        kept = (4 if tasks > 1 else 2) * trained
        return Memory(kept=kept // processes, boundary=3 * trained + trained // processes)

    def penalty(self, learner: Learner, batch: Batch, out: Tensor) -> Tensor | None:
        """Penalty lambda / 2 * sum_i F_i (theta_i - theta*_i)^2."""
        weights = {n: p for n, p in learner.named_trainable().items() if n in self.information}
        if not weights:
            return None
        terms = [self._pull(n, own_rows(p)) for n, p in weights.items()]
        return 0.5 * self.strength * added_up(terms, list(weights.values()))

    def _pull(self, name: str, rows: Tensor) -> Tensor:
        """Sum over a weight's rows here of F_i (theta_i - theta*_i)^2."""
        information, centre = own_rows(self.information[name]), own_rows(self.centre[name])
        return (information.to(rows) * (rows - centre.to(rows)).square()).sum()

    def collect(self, learner: Learner, task: Task) -> Statistics:
        """Sum over samples of the squared gradient of the log-likelihood, and their number.

        Of weights that processes share out, own rows.
        """
        batch = task.sample(self.samples, learner.seed)
        rng = generator(learner.seed, "fisher", task.index)
        count = len(next(iter(batch.values())))
        total: dict[str, Tensor] = {"samples": torch.tensor(float(count))}
        single = self.fisher != "batched"
        named = learner.named_trainable()
        weights = sum(p.numel() for p in named.values())
        most = 64 if learner.least_batch > 1 else held_at_once(weights, 64)
        size = most if single else self.fisher_batch
        for piece in split_batch(batch, size, learner.least_batch):
            if self.fisher == "true":
                piece = learner.draw_labels(piece, rng)
            found = learner.gradients(piece, per_sample="squares" if single else False)
            while found:
                name, gradient = found.popitem()  # no more than one of them is there twice
                rows = rows_of(gradient, named[name])
                squared = (
                    rows.clone() if single else rows.square() * len(next(iter(piece.values())))
                )
                total[name] = total[name].add_(squared) if name in total else squared
        return total

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """F <- gamma F + F_t (or their mean), theta* <- the new anchor.

        A task says nothing of a head that takes no part in it: its F is zero there.
        """
        count = stats["samples"]
        faded = self.decay if self.merging == "sum" else float(self.tasks)
        parts = 1 if self.merging == "sum" else self.tasks + 1
        trained = learner.named_trainable()
        for name in self.information.keys() - trained.keys():
            self.information[name] = self.information[name] * (faded / parts)
        for name, p in trained.items():
            whole = stats[name] / count  # type: ignore[operator]
            centre = own_rows(p.detach()).clone()
            if name in self.information:
                new, whole = whole, whole + faded * own_rows(self.information[name]).to(whole)
                if self.anchor == "sum":
                    pull = torch.where(whole > 0, new / whole.clamp_min(1e-38), 0.0)
                    centre = torch.lerp(own_rows(self.centre[name]).to(centre), centre, pull)
            self.information[name] = as_rows(whole / parts, p)
            self.centre[name] = as_rows(centre, p)
        self.tasks += 1

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Mean Fisher information of every parameter tensor."""
        return {n: {"fisher_mean": float(joined(f).mean())} for n, f in self.information.items()}

    def state_dict(self) -> State:
        """Fisher information, centre and the number of tasks that are in them."""
        return {
            "information": dict(self.information),
            "centre": dict(self.centre),
            "tasks": self.tasks,
        }

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.information, self.centre = dict(state["information"]), dict(state["centre"])
        self.tasks = int(state["tasks"])
