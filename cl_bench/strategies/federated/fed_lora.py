"""Low-rank pairs that clients train and a server averages, on top of weights that nobody changes.

Every target layer computes W x + alpha / r B A x (Hu et al., ICLR 2022) with A (r, d), B (o, r) in
the server's weights; a client trains both, and heads, from what it is sent. The mean of A and the
mean of B are not the pair of the mean product, which ``ffa_lora`` and ``fedsvd`` avoid.

With ``noise`` a client's step is private (Abadi et al., 2016): each sample's gradient of all that
trains, taken without dropout, is clipped to ``clip``, Gaussian noise of deviation noise * clip is
added to their sum, and the mean is taken. What this costs a client is counted by Opacus'
accountant, as if batches were drawn by Poisson sampling; they are cut from a permutation.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cl_bench.contracts import (
    Batch,
    FederatedStrategy,
    Learner,
    Needs,
    Protect,
    State,
    Task,
    UsageError,
    generator,
)
from cl_bench.contracts.options import Count, OnlyWith, Range, Rate, Strength


class FedLoRA(FederatedStrategy):
    """Federated averaging of low-rank pairs and heads.

    Args:
        rank: r of every pair.
        alpha: a pair adds alpha / r B A.
        targets: the ends of the names of the layers that get pairs, or ``all`` for every linear
            layer but heads.
        noise: standard deviation of what is added to clipped gradients, in units of ``clip``; 0
            leaves them as they are.
        clip: the longest gradient of a sample.
        delta: of (epsilon, delta) differential privacy.

    Raises:
        UsageError: ``targets`` names no linear layer, or Opacus is not installed, with ``noise``.
    """

    needs = Needs(engines=frozenset({"federated"}), freezes_weights=True)
    fixed_down: ClassVar[bool] = False
    """Whether A stays with clients."""

    def __init__(
        self,
        rank: Count = 8,
        alpha: Rate = 8.0,
        targets: Sequence[str] | Literal["all"] = "all",
        noise: Strength = 0.0,
        clip: Annotated[Rate, OnlyWith("noise")] = 2.0,
        delta: Annotated[float, Range(above=0, below=1), OnlyWith("noise")] = 1e-5,
    ) -> None:
        self.rank, self.alpha, self.targets = rank, alpha, targets
        self.noise, self.clip, self.delta = noise, clip, delta
        self.shapes: dict[str, tuple[int, int]] = {}
        self.taken: dict[str, dict[str, int]] = {}  # steps by client's seed and sampling rate
        self._hooks: list[RemovableHandle] = []
        self._batch: Batch = {}
        self._drawn, self._rate = 0, 0.0
        if noise:
            _accountant()

    def check(self, learner: Learner) -> None:
        """There must be layers to adapt."""
        self._targeted(learner)

    def _targeted(self, learner: Learner) -> dict[str, nn.Linear]:
        found: dict[str, nn.Linear] = {}
        known = learner.layers(Protect(bias="free", heads="never"))
        for one in known:
            layer = learner.network.get_submodule(one.name)
            wanted = self.targets == "all" or any(
                one.name == end or one.name.endswith(f".{end}") for end in self.targets
            )
            if wanted and isinstance(layer, nn.Linear):
                found[one.name] = layer
        if not found:
            raise UsageError(
                f"strategy.targets={self.targets}: is the end of no linear layer's name; there are "
                f"{', '.join(one.name for one in known)}"
            )
        return found

    def modules(self, learner: Learner) -> Mapping[str, nn.Module]:
        """A, as PEFT begins it, and B of zeros, for every target."""
        if not self.shapes:
            self.shapes = {
                name: (layer.in_features, layer.out_features)
                for name, layer in self._targeted(learner).items()
            }
        found: dict[str, nn.Module] = {}
        for name, (d, o) in self.shapes.items():
            A, B = nn.Linear(d, self.rank, bias=False), nn.Linear(self.rank, o, bias=False)
            nn.init.zeros_(B.weight)
            found[name.replace(".", "-")] = nn.ModuleDict({"A": A, "B": B})
        return found

    def pair(self, learner: Learner, name: str) -> tuple[nn.Linear, nn.Linear]:
        """A and B of a layer."""
        pair: Any = learner.extras(self)[name.replace(".", "-")]
        return pair["A"], pair["B"]

    def setup(self, learner: Learner, task: Task) -> None:
        """Of the network heads alone train, and what is trained of the pairs."""
        roles = learner.roles()
        trained = learner.network.named_parameters()
        learner.hold_others([p for name, p in trained if roles[name] == "head"], norms=False)
        if self.fixed_down:
            learner.hold([self.pair(learner, name)[0] for name in self.shapes])
        self._rate = min(1.0, learner.batch_size / len(task.train))
        self._attach(learner)

    def _attach(self, learner: Learner) -> None:
        scale = self.alpha / self.rank
        for name in self.shapes:
            A, B = self.pair(learner, name)

            def add(
                module: nn.Module,
                given: tuple[Any, ...],
                out: Tensor,
                A: nn.Linear = A,
                B: nn.Linear = B,
            ) -> Tensor:
                added: Tensor = scale * B(A(given[0]))
                return out + added

            layer = learner.network.get_submodule(name)
            self._hooks.append(layer.register_forward_hook(add))

    def release(self, learner: Learner) -> None:
        """The layers are the vanilla ones again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @property
    def adapters(self) -> int:
        """The pairs, which are never merged."""
        return int(bool(self.shapes))

    @contextmanager
    def inference(self, learner: Learner, task: Task | None) -> Iterator[None]:
        """With the pairs."""
        attach = bool(self.shapes) and not self._hooks
        if attach:
            self._attach(learner)
        try:
            yield
        finally:
            if attach:
                self.release(learner)

    # -- privacy ----------------------------------------------------------------------------------

    def on_batch(self, learner: Learner, batch: Batch) -> Batch:
        """Remember it, for gradients of single samples."""
        self._batch = batch if self.noise else {}
        return batch

    def constrain(self, learner: Learner) -> None:
        """Clipped and noisy gradients in place of plain ones."""
        if not self.noise:
            return
        mine = learner.gradients(self._batch, per_sample=True, mode="eval")
        trained = dict(learner.network.named_parameters())
        norm = torch.stack([g.flatten(1).square().sum(1) for g in mine.values()]).sum(0).sqrt()
        factor = (self.clip / norm.clamp(min=1e-12)).clamp(max=1)
        self._drawn += 1
        steps = self.taken.setdefault(str(learner.seed), {})
        steps[repr(self._rate)] = steps.get(repr(self._rate), 0) + 1
        rng = generator(learner.seed, "privacy", self._drawn)
        for name, gradients in mine.items():
            total = torch.einsum("n,n...->...", factor, gradients)
            drawn = torch.randn(total.shape, generator=rng, dtype=torch.float32).to(total)
            noisy = (total + self.noise * self.clip * drawn) / len(factor)
            grad = trained[name].grad
            if grad is not None:
                grad.copy_(noisy)

    def epsilon(self) -> float:
        """Of (epsilon, delta) differential privacy, for the client that it is largest of."""
        found = [0.0]
        for steps in self.taken.values():
            accountant = _accountant()
            for rate, count in steps.items():
                for _ in range(count):
                    accountant.step(noise_multiplier=self.noise, sample_rate=float(rate))
            found.append(float(accountant.get_epsilon(self.delta)))
        return max(found)

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """What privacy cost so far, where clients in this process counted their steps."""
        if not self.taken:
            return {}
        most = max(sum(steps.values()) for steps in self.taken.values())
        told = {"epsilon": self.epsilon(), "delta": self.delta, "noise": self.noise}
        return {"privacy": {**told, "clip": self.clip, "steps": most}}

    def state_dict(self) -> State:
        """Which layers have pairs, and what was drawn."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        taken = {seed: dict(steps) for seed, steps in self.taken.items()}
        return {"shapes": shapes, "taken": taken, "drawn": self._drawn}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.shapes = {name: (d, o) for name, (d, o) in state["shapes"].items()}
        self.taken = {seed: dict(steps) for seed, steps in state["taken"].items()}
        self._drawn = state["drawn"]


def _accountant() -> Any:
    try:
        from opacus.accountants import RDPAccountant
    except ImportError as error:
        raise UsageError(
            "strategy.noise: its cost is counted by Opacus, which is not installed: "
            f"pip install 'cl_bench[privacy]' ({error})"
        ) from None
    return RDPAccountant()
