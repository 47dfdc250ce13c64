"""Trust Region Gradient Projection (Lin, Yang, Fan & Zhang, ICLR 2022, "TRGP").

GPM with forward transfer. Before task t, the old tasks j whose input subspace B_j holds much of
the new gradient form a layer's trust region. There the old weights are reused, rescaled by a matrix
Q_j that only task t sees: W_eff = W + sum_j W B_j (Q_j - I) B_j^T. W itself is projected as in GPM.
Every task is tested with its own Q_j, so the task id must be known at test time.

The steps follow the authors' code (github.com/LYang-666/TRGP); we have not checked the paper's
equation numbers.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cl_bench.contracts import (
    Learner,
    Needs,
    State,
    Statistics,
    Task,
    UsageError,
)
from cl_bench.contracts.options import Count, Inherited, Share
from cl_bench.strategies.projection.gpm import GPM, layer_gradients
from cl_bench.subspace import LinearMap, Moments, Rescaling, Where, extend, rank_to_reach


class TRGP(GPM):
    """Reuses the weights of related old tasks through scaling matrices of the task's own.

    Args:
        trust: eps1 in [0, 1]; task j is trusted where ||G B_j B_j^T|| > eps1 ||G||.
        regions: most tasks that a layer trusts, the ones with the largest projection.
        trust_samples: training samples that G is the loss gradient of.
        official_quirks: as in the authors' code, the strongest new direction of every later task
            does not enter the memory (an off-by-one), so nothing protects it. Nothing else of that
            code is switched: on permuted MNIST, five data sets and miniImageNet its third task
            considers the second alone; on split CIFAR-100 normalisation goes on training, which
            here is ``protect.norm=free``.
        shared: as in :class:`GPM`.

    Raises:
        UsageError: an option is out of range.
    """

    needs = Needs(task_id_at_test=True, rewrites_gradients=True, shardable=False)

    def __init__(
        self,
        *,
        trust: Share = 0.5,
        regions: Count = 2,
        trust_samples: Count = 300,
        official_quirks: bool = False,
        **shared: Inherited,
    ) -> None:
        super().__init__(**shared)
        self.trust = trust
        self.regions = regions
        self.trust_samples = trust_samples
        self.official_quirks = official_quirks
        self.subspaces: dict[str, list[Tensor]] = {}  # B_1, B_2, ... of every layer
        self.region: dict[str, list[int]] = {}  # the tasks a layer trusts now
        self.stored: dict[int, dict[str, dict[int, Tensor]]] = {}  # task: layer: {j: Q_j - I}
        self.rescaling: Rescaling | None = None

    def footprint(self, learner: Learner, tasks: int, processes: int) -> None:
        """It has more than :class:`GPM`, and does not say how much."""
        return

    def check(self, learner: Learner) -> None:
        """As GPM; and every layer must put out W x, which is what is rescaled."""
        super().check(learner)
        odd = [m.name for m in learner.layers(self.protect) if not m.is_whole_layer]
        if odd:
            raise UsageError(
                f"TRGP rescales the outputs of linear layers, and {odd[0]!r} is part of a mixture "
                "of experts: use strategy=gpm, or strategy.protect.exclude=['*expert*','*gate']"
            )

    def setup(self, learner: Learner, task: Task) -> None:
        """As GPM; then find each layer's trust region at the incoming weights."""
        super().setup(learner, task)
        self.region = {}
        if self.memory:
            batch = task.sample(self.trust_samples, learner.seed)
            for name, G in layer_gradients(learner, self.layers, batch).items():
                self.region[name] = self.trusted(name, G)
        start = {name: dict.fromkeys(js) for name, js in self.region.items()}
        self.rescaling = self._rescaling(self.layers, start)

    def trusted(self, name: str, G: Tensor) -> list[int]:
        """The old tasks with the largest ||G B_j B_j^T||, if above eps1 ||G||."""
        inside = [float((G @ B.to(G)).norm()) for B in self.subspaces.get(name, ())]
        best = sorted(range(len(inside)), key=inside.__getitem__, reverse=True)[: self.regions]
        return [j for j in best if inside[j] > self.trust * float(G.norm())]

    def place(self, learner: Learner) -> Where:
        """As GPM; but where M lacks part of B_j, W B_j moves and gets gradients of its own."""
        where = super().place(learner)
        return "gradient" if self.official_quirks and where == "input" else where

    def _rescaling(
        self, layers: Sequence[LinearMap], changes: Mapping[str, Mapping[int, Tensor | None]]
    ) -> Rescaling:
        """W_eff with Q_j - I as given by layer and task; None starts at Q_j = I."""
        rescaling = Rescaling(layers)
        for name, by_task in changes.items():
            for j, change in by_task.items():
                B = self.subspaces[name][j]
                rescaling.add(name, B, change=change, live=self.official_quirks)
        rescaling.attach()
        return rescaling

    def param_groups(self, learner: Learner) -> Iterable[dict[str, Any]]:
        """The weights, and Q_j without weight decay."""
        scales = self.rescaling.parameters() if self.rescaling else []
        return [*super().param_groups(learner), {"params": scales, "weight_decay": 0.0}]

    def collect(self, learner: Learner, task: Task) -> Statistics:
        """Keep the task's Q_j; then as GPM, on the shared W alone."""
        if self.rescaling:
            self.stored[task.index] = {
                name: {j: t.change.detach().clone() for j, t in zip(js, terms, strict=True)}
                for name, terms in self.rescaling.terms.items()
                for js in (self.region[name],)
            }
            self.rescaling.clear()
        return super().collect(learner, task)

    def remember(self, name: str, R: Moments, eps: float) -> None:
        """B_t: old and new directions compete by ||m_i^T R||^2; new ones that win join M."""
        if name not in self.memory:
            super().remember(name, R, eps)
            self.subspaces[name] = [self.memory[name]]
            return
        M = self.memory[name]
        k = M.shape[1]
        S2, U = R.principal(outside=M)
        energies = torch.cat([R.energy_along(M).to(S2), S2])
        order = energies.argsort(descending=True, stable=True)
        chosen = order[: rank_to_reach(energies[order], R.energy, eps)]
        M, new = M.to(U), U[:, chosen[chosen >= k] - k]
        grown = extend(M, new)
        self.subspaces[name].append(torch.cat([M[:, chosen[chosen < k]], grown[:, k:]], dim=1))
        self.memory[name] = extend(M, new[:, 1:]) if self.official_quirks else grown

    @contextmanager
    def inference(self, learner: Learner, task: Task | None) -> Iterator[None]:
        """A learned task with its own Q_j; otherwise the network as it is."""
        if task is None or task.index not in self.stored:
            yield
            return
        if self.rescaling:
            self.rescaling.release()
        own = self._rescaling(learner.layers(self.protect), self.stored[task.index])
        try:
            yield
        finally:
            own.release()
            if self.rescaling:
                self.rescaling.attach()

    def release(self, learner: Learner) -> None:
        """The layers' own forward pass, and gradients."""
        if self.rescaling:
            self.rescaling.clear()
        self.rescaling = None
        super().release(learner)

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """GPM's, the rank of the latest B_t, and how many tasks the layer trusted."""
        return {
            name: {
                **values,
                "task_rank": self.subspaces[name][-1].shape[1],
                "trusted": len(self.region.get(name, ())),
            }
            for name, values in super().metrics().items()
        }

    def state_dict(self) -> State:
        """GPM's, every B_j and Q_j, and the current task's trust region with its Q_j."""
        return {
            **super().state_dict(),
            "subspaces": {name: list(bases) for name, bases in self.subspaces.items()},
            "stored": {t: {n: dict(q) for n, q in by.items()} for t, by in self.stored.items()},
            "region": {name: list(js) for name, js in self.region.items()},
            "rescaling": self.rescaling.state_dict() if self.rescaling else {},
        }

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        super().load_state_dict(state)
        self.subspaces = {name: list(bases) for name, bases in state["subspaces"].items()}
        self.stored = {t: dict(by_layer) for t, by_layer in state["stored"].items()}
        self.region = {name: list(js) for name, js in state["region"].items()}
        if self.rescaling:
            self.rescaling.load_state_dict(state["rescaling"])
