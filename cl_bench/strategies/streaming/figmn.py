"""Fast incremental Gaussian mixture network (repository FIGMN @ e0a2afa).

A mixture over [features, one-hot label], kept as precision matrices, learns every sample; labels
are what it expects of the second part given the first. A sample that lies far from all components
makes one of its own, and moves no other. The authors' code moves all others as well, so that the
newborn counts twice, and mixes answers without the components' masses (``priors: false``); its
covariance recursion can lose positive definiteness (:class:`~cl_bench.subspace.Mixture`) and is
there as ``rule: published``. The correction of the article (doi 10.1371/journal.pone.0141942) could
not be read.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from scipy.stats import chi2
from torch import Tensor

from cl_bench.contracts.options import Count, Range, Rate
from cl_bench.strategies.streaming.observer import StreamLearner
from cl_bench.subspace import Mixture
from cl_bench.subspace.mixture import Rule


class FIGMN(StreamLearner):
    """An incremental mixture of Gaussians.

    Args:
        delta: deviation of a new component, in units of a feature's deviation and of a label's 1.
        tau: a sample outside the 1 - tau quantile of every component makes a new one.
        components: at most so many; of more, the lightest goes.
        age: samples after which a component that gained less than ``mass`` beyond its first
            sample goes as spurious, in multiples of the number of dimensions.
        mass: see ``age``.
        priors: answers weigh components by their mass.
        rule: of the covariance, ``exact`` or as ``published``.
    """

    def __init__(
        self,
        delta: Rate = 0.5,
        tau: Annotated[float, Range(above=0, below=1)] = 0.001,
        components: Count = 20,
        age: Rate = 2.0,
        mass: Rate = 3.0,
        priors: bool = True,
        rule: Rule = "exact",
    ) -> None:
        super().__init__()
        self.delta, self.tau, self.components = delta, tau, components
        self.age, self.mass, self.priors, self.rule = age, mass, priors, rule
        self.mixture: Mixture | None = None
        self._far = 0.0

    def grow(self, classes: int) -> None:
        """In the label's new dimensions every sample was 0."""
        if self.mixture is not None:
            new = torch.full((classes - self.classes,), self.delta**2, dtype=torch.float64)
            self.mixture.widen(new)
            self._measure()

    def begin(self, x: Tensor, seed: int) -> None:
        """No components yet."""
        self.mixture = Mixture(x.shape[1] + self.classes, self.rule)
        self._measure()

    def _measure(self) -> None:
        assert self.mixture is not None
        self._far = float(chi2.ppf(1 - self.tau, self.mixture.mean.shape[1]))

    def learn(self, x: Tensor, y: Tensor) -> None:
        """One sample after another."""
        mixture = self.mixture
        assert mixture is not None
        for joint in torch.cat([x, y], 1):
            if len(mixture) and float(mixture.distances(joint).min()) < self._far:
                mixture.learn(joint)
                continue
            self._prune()
            mixture.create(joint, torch.full_like(joint, self.delta**2))

    def _prune(self) -> None:
        """Spurious components go, and the lightest where there are too many."""
        mixture = self.mixture
        assert mixture is not None
        old = mixture.age > self.age * mixture.mean.shape[1]
        kept = ~(old & (mixture.mass < 1 + self.mass))
        mixture.keep(kept)
        if len(mixture) >= self.components:
            mixture.keep(torch.arange(len(mixture)) != mixture.mass.argmin())

    def answers(self, x: Tensor) -> Tensor:
        """Expected labels."""
        assert self.mixture is not None
        return self.mixture.regress(x, self.priors)

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """How many components there are."""
        return {"mixture": {"components": len(self.mixture or ())}}

    def memory(self) -> Mapping[str, Any]:
        """The mixture."""
        assert self.mixture is not None
        return self.mixture.state_dict()

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Inverse of :meth:`memory`."""
        self.mixture = Mixture(memory["mean"].shape[1], self.rule)
        self.mixture.load_state_dict(dict(memory))
        self._measure()
