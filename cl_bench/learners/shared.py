"""The services of a network that processes may share, and what they make it compute."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from cl_bench.contracts import Batch, Strategy, UsageError, derive_seed
from cl_bench.contracts.learner import Mode, Of, PerSample
from cl_bench.contracts.plan import Start
from cl_bench.contracts.strategy import overrides
from cl_bench.learners.network import NetworkServices
from cl_bench.learners.rounding import Rounding
from cl_bench.learners.snapshot import Snapshot
from cl_bench.learners.work import Work
from cl_bench.parallel import sharding
from cl_bench.parallel.ranks import is_idle, share, world
from cl_bench.parallel.turns import in_turns
from cl_bench.subspace import Accumulator, LinearMap, Moments, shared_out


class SharedServices(NetworkServices):
    """Mixin: weights of which each process may hold a part, and batches of which each sees one.

    Attributes:
        work: what the network was made to compute.
        seed: of whatever is drawn.
        strategy: whose modules are part of the network.
        rounding: of weights for each pass; None where passes see them as they are.
    """

    rounding: Rounding | None = None
    work: Work
    seed: int
    strategy: Strategy
    _extras: dict[int, nn.ModuleDict]
    _initial: Mapping[str, Tensor]
    _learnable: set[nn.Parameter]
    _held: set[Tensor]
    _cut_again = False

    def initial_state(self) -> Mapping[str, Tensor]:
        """Weights and buffers as they were at construction."""
        return self._initial

    def remember_initial_state(self) -> None:
        """To be called at the end of a subclass's constructor."""
        self._initial = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        self._learnable = {p for p in self.network.parameters() if p.requires_grad}

    def keep_masters(self, dtype: torch.dtype) -> None:
        """Weights are float32 from now on, and each pass sees what ``dtype`` makes of them."""
        self.network.float()
        self.remember_initial_state()
        self.rounding = Rounding(dtype)
        inside = {m for block in self.blocks() for m in block.modules() if m is not block}
        others = [m for m in self.network.modules() if m is not self.network and m not in inside]
        self.rounding.attach(others)

    def rounded(self) -> AbstractContextManager[None]:
        """Inside, where weights stay as they are, many passes round them once."""
        if self.rounding is None or not self.rounding.attached:
            return nullcontext()
        return self.rounding.held(self.network)

    def shard(self, computed_in: torch.dtype | None = None, cut_again: bool = False) -> None:
        """Share the weights out among the processes, for good.

        Args:
            computed_in: half precision that layers compute in; weights stay what they are.
            cut_again: whether all weights are cut into rows again before a penalty is asked for.

        Raises:
            UsageError: they cannot be.
        """
        network: Any = self.network
        if self.rounding is not None:  # FSDP2 does it, to what it puts together
            self.rounding.detach()
            computed_in = self.rounding.dtype
        learnable = {name for name, p in network.named_parameters() if p in self._learnable}
        self._learnable = set()  # or the whole weights would stay as long
        sharding.shard(network, self.blocks(), ("features", "readout"), computed_in, cut_again)
        self._cut_again = cut_again
        if not hasattr(network, "config"):  # PEFT asks whatever has a device mesh for one
            network.config = {"model_type": "custom"}
        self._learnable = {p for name, p in network.named_parameters() if name in learnable}
        filled, now = sharding.filled(network, self._initial), network.state_dict()
        self._initial = {
            k: v.detach().clone() if filled else shared_out(self._initial[k], v)
            for k, v in now.items()
        }

    @property
    def sharded(self) -> bool:
        """Whether processes share the weights out."""
        return sharding.is_sharded(self.network)

    def put_together(self) -> AbstractContextManager[None]:
        """Inside, every process holds all weights, to read; all must enter and leave together."""
        return sharding.put_together(self.network, self._cut_again)

    def in_turns(self) -> AbstractContextManager[None]:
        """Inside, each process calls the network as often as it likes, without gradients."""
        return in_turns(self.network, self._cut_again)

    def weights(self) -> dict[str, Tensor]:
        """Weights and buffers, whole."""
        weights = self.network.state_dict()
        return sharding.whole(weights) if self.sharded else weights

    def saved_weights(self) -> dict[str, Tensor]:
        """Weights and buffers for a file that process 0 writes; elsewhere they may be empty."""
        weights = self.network.state_dict()
        return sharding.to_first(weights) if self.sharded else weights

    def own_weights(self) -> dict[str, Tensor]:
        """Weights and buffers as this process has them."""
        return dict(self.network.state_dict())

    @property
    def mesh(self) -> DeviceMesh | None:
        """Of the processes that share the weights out."""
        return sharding.mesh(self.network)

    def load_weights(self, weights: Mapping[str, Any]) -> None:
        """Inverse of :meth:`weights` and :meth:`own_weights`."""
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
        of: Of = "loss",
        per_sample: PerSample = False,
        mode: Mode = "eval",
    ) -> dict[str, Tensor]:
        """Raw gradients of the trainable parameters at the current weights; no side effects."""
        self.work.batch(batch, backward=True)
        with self.put_together():
            return super().gradients(batch, of, per_sample, mode)

    def snapshot(self) -> Snapshot:
        """A frozen copy of the network as it is now.

        Raises:
            UsageError: processes share the weights out, so that none of them has a network to copy.
        """
        if self.sharded:
            raise UsageError(
                "this strategy keeps a copy of the network, of which each process here holds a "
                "part: let every process hold all weights (trainer=ddp)"
            )
        return super().snapshot()

    def _left_behind(self) -> dict[int, Any]:
        empty: list[Any] = [self._initial, self._learnable, self._held]
        return {**super()._left_behind(), **{id(value): type(value)() for value in empty}}

    def _passed(self, batch: Batch, backward: bool) -> None:
        self.work.batch(batch, backward)

    def second_moments(self) -> dict[str, Tensor]:
        """The optimizer's running second moments, whole, by the name of their parameter."""
        moments = super().second_moments()
        return sharding.whole(moments) if self.sharded else moments

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the network is in evaluation mode, and may be called without gradients.

        Where processes share the weights out, all must enter and leave together.
        """
        with super().evaluating(), self.in_turns():
            yield

    @contextmanager
    def _as_in_training(self) -> Iterator[None]:
        with super()._as_in_training(), self.put_together():
            yield

    def learns(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter learns unless a strategy freezes it: as it was at construction."""
        return parameter in self._learnable

    def _freeze(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            parameter.requires_grad_(False)
            self._held.add(parameter)

    def reset_weights(self) -> None:
        """Back to the weights of construction; modules of strategies stay."""
        self.load_weights({**self.network.state_dict(), **self.initial_state()})

    def start_from(self, start: Start) -> None:
        """Put the weights there that a plan begins from; heads of other tasks stay."""
        if start == "current":
            return
        chosen = self.initial_state() if start == "initial" else start
        assert isinstance(chosen, Mapping)
        own = {k: v for k, v in chosen.items() if not self.is_foreign_head(k)}
        self.load_weights({**self.network.state_dict(), **own})

    # -- modules of strategies --------------------------------------------------------------------

    def equip(self, strategy: Strategy) -> None:
        """Give the network the modules that ``strategy`` asks for now; those it has stay.

        Raises:
            TypeError: a module has changed its shape under its old name.
        """
        found = nn.ModuleDict()
        for i, member in enumerate(strategy.members):
            before = dict(self._extras.get(i, nn.ModuleDict()).items())
            asked = self._asked(member, i)
            if not asked:
                self._extras.pop(i, None)
                continue
            kept = {name: before.get(name, new) for name, new in asked.items()}
            for name, module in kept.items():
                if _shapes(module) != _shapes(asked[name]):
                    raise TypeError(
                        f"{type(member).__name__}.modules gives {name!r} another shape than it "
                        "had: give what grows another name"
                    )
                if module is asked[name]:
                    self._adopt(module)
            self._extras[i] = nn.ModuleDict(kept)
            found[self._name_of(strategy, i)] = self._extras[i]
        for i in [i for i in self._extras if i >= len(strategy.members)]:
            del self._extras[i]
        if len(found):
            self.network.extra = found
        elif hasattr(self.network, "extra"):
            del self.network.extra

    def _asked(self, member: Strategy, i: int) -> Mapping[str, nn.Module]:
        """A member's modules; what training draws at random stays as it was, on a GPU too."""
        if not overrides(member, "modules"):
            return {}
        seed = derive_seed(self.seed, "modules", i)
        device = next(self.network.parameters()).device
        on_gpu = device.type == "cuda"
        with torch.random.fork_rng(devices=[device] if on_gpu else []):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed reaches every GPU
            if on_gpu:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            return member.modules(self)  # type: ignore[arg-type]

    def _adopt(self, module: nn.Module) -> None:
        module.to(next(self.network.parameters()))
        module.train(self.network.training)
        self._learnable.update(p for p in module.parameters() if p.requires_grad)
        if self.rounding is not None:
            self.rounding.attach(module.modules())

    @staticmethod
    def _name_of(strategy: Strategy, i: int) -> str:
        """What a member's modules go by: its class's name, numbered from the second on."""
        names = [type(member).__name__ for member in strategy.members]
        earlier = names[:i].count(names[i])
        return f"{names[i]}_{earlier + 1}" if earlier else names[i]

    def extras(self, strategy: object) -> nn.ModuleDict:
        """The modules that ``strategy`` has asked for; empty where it has none."""
        for i, member in enumerate(self.strategy.members):
            if member is strategy:
                return self._extras.get(i, nn.ModuleDict())
        return nn.ModuleDict()


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}
