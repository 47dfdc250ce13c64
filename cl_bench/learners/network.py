"""How strategies reach a network: the services that need nothing but the module itself."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cl_bench.contracts import Batch, Loss
from cl_bench.contracts.learner import Mode, Of, PerSample, Role
from cl_bench.learners.batch_norm import by_batch
from cl_bench.learners.guardable import is_norm
from cl_bench.learners.modes import own_buffers, same_modes, without_adapters
from cl_bench.learners.per_sample import (
    per_sample_gradients,
    squares_of,
    within_the_batch,
)
from cl_bench.learners.protection import Protection
from cl_bench.learners.roles import roles
from cl_bench.learners.snapshot import Snapshot
from cl_bench.optimizers import second_moments
from cl_bench.subspace import (
    Accumulator,
    LinearMap,
    Moments,
    dropping,
    tapped,
    unconfined,
)


class NetworkServices(Protection):
    """Mixin: the part of the Learner contract that any module can serve."""

    @property
    def body(self) -> nn.Module:
        """The network without its heads."""
        return self.network

    if TYPE_CHECKING:

        def __call__(self, batch: Batch, head: int | None = None) -> Tensor:
            """Logits for a batch."""

    @abstractmethod
    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        """Mean loss over the batch."""

    @abstractmethod
    def label_logits(self, out: Tensor, batch: Batch) -> Tensor:
        """Logit of every sample's own label."""

    def total_loss(self, out: Tensor, batch: Batch) -> Loss:
        """The loss as what may be added up over batches, in double precision."""
        return Loss(self.loss(out, batch).double() * len(out), len(out))

    def extras(self, strategy: object) -> nn.ModuleDict:
        """The modules that ``strategy`` has asked for: none, where nobody builds them."""
        return nn.ModuleDict()

    @abstractmethod
    def _features(self, batch: Batch) -> Tensor:
        """What the readout reads."""

    def features(self, batch: Batch, bare: bool = False) -> Tensor:
        """What the readout reads: (n, d), of causal and decoding language models (n, L, d)."""
        self._passed(batch, backward=torch.is_grad_enabled())
        batch = self._to_device(batch)
        with without_adapters(self.network) if bare else nullcontext():
            return self._features(batch)

    def snapshot(self) -> Snapshot:
        """A frozen copy of the network as it is now."""
        return Snapshot(self, self._left_behind())

    def _left_behind(self) -> dict[int, Any]:
        """What is no part of a copy of the network: what stands in for it, by its id."""
        return {}

    def _passed(self, batch: Batch, backward: bool) -> None:
        """A strategy has a batch go forward and, perhaps, back."""

    def roles(self) -> dict[str, Role]:
        """What every parameter is for, by name."""
        return roles(self.network, is_norm, self._head_parameters())

    def _head_parameters(self) -> frozenset[Tensor]:
        """Parameters of output heads, as far as these are known."""
        return frozenset()

    def second_moments(self) -> dict[str, Tensor]:
        """The optimizer's running second moments, by the name of their parameter."""
        return second_moments(self._optimizing(), dict(self.network.named_parameters()))

    def _optimizing(self) -> Sequence[Optimizer]:
        """The optimizers that train now."""
        return ()

    def is_foreign_head(self, name: str) -> bool:
        """Whether a parameter belongs to the head of another task than the one that is learned."""
        return False

    @property
    def by_batch(self) -> list[str]:
        """Layers whose outputs for a sample depend on the batch, in evaluation too."""
        return by_batch(self.network)

    @property
    def least_batch(self) -> int:
        """2 where a batch of one sample means something else than the sample in a larger one."""
        return 2 if self.by_batch else 1

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters that take part in the current task."""
        return list(self.named_trainable().values())

    def named_trainable(self) -> dict[str, nn.Parameter]:
        """The same, by name."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def blocks(self) -> list[nn.Module]:
        """The backbone's ``blocks`` if it names them, else its children that hold parameters."""
        named = getattr(self.body, "blocks", None)
        if named is not None:
            return list(named() if callable(named) and not isinstance(named, nn.Module) else named)
        return [m for m in self.body.children() if any(True for _ in m.parameters())]

    def embeddings(self) -> list[nn.Module]:
        """Input embeddings: of tokens, of learned positions; none in a network without them."""
        return [m for m in self.body.modules() if isinstance(m, nn.Embedding)]

    def tap(
        self,
        layers: Sequence[LinearMap],
        batches: Iterable[Batch],
        into: Mapping[str, Accumulator] | None = None,
        dropout: bool = False,
    ) -> Mapping[str, Moments]:
        """Second moments of the layers' inputs over the batches, in evaluation mode."""
        with ExitStack() as within:
            within.enter_context(torch.no_grad())
            within.enter_context(self.evaluating())
            if dropout:
                within.enter_context(dropping(self.network))
            moments = within.enter_context(tapped(layers, into))
            for batch in batches:
                batch = self._to_device(batch)
                moments.begin(len(next(iter(batch.values()))), partial(self.counted, batch))
                self(batch)
        return moments

    def counted(self, batch: Batch, layer: str) -> Tensor | None:
        """Which positions (n, L) of a layer's inputs hold something; None: all of them."""
        return None

    def gradients(
        self,
        batch: Batch,
        of: Of = "loss",
        per_sample: PerSample = False,
        mode: Mode = "eval",
    ) -> dict[str, Tensor]:
        """Raw gradients of the trainable parameters at the current weights; no side effects."""
        batch = self._to_device(batch)

        def of_outputs(out: Tensor, batch: Batch) -> Tensor:
            if callable(of):
                return of(out, batch)
            return self.loss(out, batch) if of == "loss" else self.label_logits(out, batch).mean()

        def value(batch: Batch) -> Tensor:
            return of_outputs(self(batch), batch)

        looking = self.evaluating() if mode == "eval" else self._as_in_training()
        with unconfined(), looking, torch.enable_grad():
            parameters = self.named_trainable()
            if not parameters:
                return {}
            if per_sample and (self.by_batch or mode == "train"):
                squares = per_sample == "squares"
                return within_the_batch(parameters, self(batch), batch, of_outputs, squares)
            if per_sample:
                found = per_sample_gradients(self.network, parameters, value, batch)
                return squares_of(found) if per_sample == "squares" else found
            values = torch.autograd.grad(value(batch), list(parameters.values()), allow_unused=True)
            return {
                name: torch.zeros_like(parameters[name]) if g is None else g
                for name, g in zip(parameters, values, strict=True)
            }

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the network is in evaluation mode."""
        with same_modes(self.network):
            self.network.eval()
            yield

    @contextmanager
    def _as_in_training(self) -> Iterator[None]:
        with same_modes(self.network), own_buffers(self.network):
            if not self.network.training:  # else parts of it may be in evaluation mode for good
                self.network.train()
            yield

    def _to_device(self, batch: Batch) -> Batch:
        weight = next(self.network.parameters())
        # trainer.precision=64-true: what the Trainer does to its own batches.
        dtype = None if weight.dtype == torch.float32 else weight.dtype
        return {
            name: value.to(weight.device, dtype if value.is_floating_point() else None)
            for name, value in batch.items()
        }
