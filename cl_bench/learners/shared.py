"""The services of a network that processes may share, and what they make it compute."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from cl_bench.contracts import Batch
from cl_bench.learners.network import NetworkServices
from cl_bench.learners.work import Work
from cl_bench.parallel import sharding
from cl_bench.parallel.ranks import is_idle, share, world
from cl_bench.subspace import Accumulator, LinearMap, Moments


class SharedServices(NetworkServices):
    """Mixin: weights of which each process may hold a part, and batches of which each sees one.

    Attributes:
        work: what the network was made to compute.
    """

    work: Work
    _initial: Mapping[str, Tensor]
    _learnable: set[nn.Parameter]
    _held: set[Tensor]

    def initial_state(self) -> Mapping[str, Tensor]:
        """Weights and buffers as they were at construction."""
        return self._initial

    def remember_initial_state(self) -> None:
        """To be called at the end of a subclass's constructor."""
        self._initial = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        self._learnable = {p for p in self.network.parameters() if p.requires_grad}

    def shard(self) -> None:
        """Share the weights out among the processes, for good.

        Raises:
            UsageError: they cannot be.
        """
        network: Any = self.network
        learnable = {name for name, p in network.named_parameters() if p in self._learnable}
        sharding.shard(network, self.blocks())
        if not hasattr(network, "config"):  # PEFT asks whatever has a device mesh for one
            network.config = {"model_type": "custom"}
        self._learnable = {p for name, p in network.named_parameters() if name in learnable}

    @property
    def sharded(self) -> bool:
        """Whether processes share the weights out."""
        return sharding.is_sharded(self.network)

    def put_together(self) -> AbstractContextManager[None]:
        """Inside, every process holds all weights, to read; all must enter and leave together."""
        return sharding.put_together(self.network)

    def weights(self) -> dict[str, Tensor]:
        """Weights and buffers, whole."""
        weights = self.network.state_dict()
        return sharding.whole(weights) if self.sharded else weights

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`weights`."""
        if self.sharded:
            sharding.load_weights(self.network, weights)
        else:
            self.network.load_state_dict(weights)

    def tap(
        self,
        layers: Sequence[LinearMap],
        batches: Iterable[Batch],
        into: Mapping[str, Accumulator] | None = None,
        dropout: bool = False,
    ) -> Mapping[str, Moments]:
        """Second moments of the layers' inputs over the batches, in evaluation mode."""
        batches = list(batches) if world() > 1 else batches
        apart = world() > 1 and into is None

        def counted() -> Iterator[Batch]:
            for batch in batches:
                self.work.batch(batch, backward=False)
                if not apart:
                    yield batch
                elif not is_idle(batch):
                    yield share(batch)

        moments = super().tap(layers, counted(), into, dropout)
        if apart:
            for inputs in dict.fromkeys(moments[layer.name] for layer in layers):
                inputs.all_reduce()
        return moments

    def gradients(
        self,
        batch: Batch,
        of: Literal["loss", "logits"] = "loss",
        per_sample: bool = False,
    ) -> dict[str, Tensor]:
        """Raw gradients of the trainable parameters at the current weights; no side effects."""
        self.work.batch(batch, backward=True)
        return super().gradients(batch, of, per_sample)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        with super()._evaluating(), self.put_together():
            yield

    def learns(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter learns unless a strategy freezes it: as it was at construction."""
        return parameter in self._learnable

    def _freeze(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            parameter.requires_grad_(False)
            self._held.add(parameter)

    def reset_weights(self) -> None:
        """Back to the weights of construction."""
        self.load_weights(self.initial_state())
