"""The strategy: which weight updates are allowed. Every hook has a default that does nothing."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, Self

from torch import Tensor, nn

from cl_bench.contracts.checking import checked
from cl_bench.contracts.learner import Learner
from cl_bench.contracts.loss import Loss
from cl_bench.contracts.memory import Memory
from cl_bench.contracts.plan import Phase, Plan
from cl_bench.contracts.stream import Batch, Scenario, Stream, Task

State = dict[str, Any]
"""Nested dictionaries and lists of tensors and plain values: what ``weights_only`` can load."""


class Summable(Protocol):
    """Statistics that ranks and clients may add up: tensors, or objects with ``+``."""

    def __add__(self, other: Any, /) -> Self: ...


Statistics = Mapping[str, Summable]


Kind = Literal["local", "federated", "streaming"]
"""Of engines: one site's data, task by task; clients and a server; one pass, tested first."""

LOCAL_OR_FEDERATED: frozenset[Kind] = frozenset({"local", "federated"})

CLASSIFIED: frozenset[str] = frozenset({"image", "tokens", "features"})
"""Modalities of streams whose samples a classifier tells apart: all but text that is generated."""


@dataclass(frozen=True)
class Needs:
    """What a strategy asks of the rest; checked before any work starts.

    Attributes:
        task_id_at_test: works only where the task id is known at test time.
        rewrites_gradients: two strategies that both do are refused together.
        shardable: works where every process holds some rows of each weight (FSDP2).
        gathers: there, has every process hold all weights now and then, which large networks
            refuse.
        engines: what can learn under it: ``local`` has one site's data, ``federated`` clients and a
            server; what runs ``local`` may stream as well, and ``streaming`` alone means that
            :meth:`Strategy.observe` learns everything.
        first_batch: samples that the first call of :meth:`Strategy.observe` must bring.
        plateau: works only where the rate decays on a plateau of the validation loss.
        modalities: kinds of streams it can learn; empty means any.
        scenarios: of streams it can learn; empty means any.
        first_task: index of the first task that it treats in its own way; a stream of several
            tasks that ends before it is refused.
        epochs: how many every task must be learned for, at least.
        freezes_weights: trains parameters of its own in place of the network's weights; a companion
            that pulls at the weights is refused.
        adapts: puts adapters around the network's layers, which train in place of their weights.
        own_weights: works on the network's own weights, by name or as matrices, so that adapters
            in their place are refused; whoever guards weights does so anyway.
        forgets: knows what to do with requests to forget; without it, streams that have them are
            refused.
        sample_index: training batches carry ``index`` int64 (n,), each sample's position in the
            data that is trained on (in a federation, in the client's own).
        plain_view: training batches carry ``plain``, which is ``x`` without augmentation; text has
            none.
        options: which option of the strategy decides one of the above, ``collects_on`` or a
            quantity of :meth:`Strategy.metrics`; messages name it.
    """

    task_id_at_test: bool = False
    rewrites_gradients: bool = False
    shardable: bool = True
    gathers: bool = False
    engines: frozenset[Kind] = frozenset({"local"})
    first_batch: int = 1
    plateau: bool = False
    modalities: frozenset[str] = frozenset()
    scenarios: frozenset[Scenario] = frozenset()
    first_task: int = 0
    epochs: int = 1
    freezes_weights: bool = False
    adapts: bool = False
    own_weights: bool = False
    forgets: bool = False
    sample_index: bool = False
    plain_view: bool = False
    options: Mapping[str, str] = field(default_factory=dict)

    def said(self, what: str, value: object) -> str:
        """How somebody asked for ``what``: ``strategy.<option>=<value>``, if there is an option."""
        option = self.options.get(what)
        return f"{what}={value}" if option is None else f"strategy.{option}={value}"


@dataclass(frozen=True)
class Progress:
    """Where training stands at the end of an epoch.

    Attributes:
        epoch: epochs of this task that are done, from 1.
        max_epochs: epochs the task may take.
        train_loss: mean loss of the epoch, penalty included.
        learning_rate: rate of the first parameter group from now on.
        plateau: whether a decay on plateau ran out of patience and lowered the rate with this
            epoch; None where the run has no such decay.
    """

    epoch: int
    max_epochs: int
    train_loss: float
    learning_rate: float
    plateau: bool | None = None


@dataclass(frozen=True)
class EpochDecision:
    """What a strategy wants after an epoch.

    Attributes:
        scale_rate: multiply every learning rate by this.
        reset_rate: first set every rate back to its initial value.
        rebuild_optimizer: the parameter groups changed; build the optimizer anew.
        stop: this task is learned.
    """

    scale_rate: float = 1.0
    reset_rate: bool = False
    rebuild_optimizer: bool = False
    stop: bool = False


class Strategy:
    """Base class of all update rules.

    A strategy knows no engine: it never steps an optimizer, never fills ``.grad`` itself, and sees
    no Trainer, logger, device or path. It reaches the network through the learner's services. The
    hooks below are called in this order for every task ``t``::

        plan -> modules -> setup -> param_groups
            per batch:  on_batch -> objective, penalty -> constrain -> after_step
            per epoch:  after_epoch
        phases (each with batches and epochs of its own)
        collect -> consolidate -> release
        evaluation of a task:  inference around it, predict for every batch
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """The options of every strategy are checked against their annotations."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            checked("strategy.")(cls)

    needs: Needs = Needs()

    penalises_weights: ClassVar[bool] = True
    """Whether :meth:`penalty`, where there is one, depends on the network's weights; a penalty on
    parameters of the strategy's own leaves the weights' gradients to their layers."""

    bound: ClassVar[Literal["lower", "upper"] | None] = None
    """Whether other strategies are held against it: as what forgets, or what learns, the most."""

    idle: frozenset[str] = frozenset()
    """Hooks that it implements and that its options turn off."""

    @property
    def exemplars(self) -> int:
        """How many samples of tasks it keeps now; reports set such rows apart from others."""
        return 0

    @property
    def passes(self) -> int:
        """Forward passes of a network that one answer of :meth:`predict` takes now."""
        return 1

    @property
    def adapters(self) -> int:
        """How many adapters, one a task or one for all, must be in memory to answer now.

        What was merged into the weights does not count; in a task that is being learned, its own
        does not either.
        """
        return 0

    @property
    def members(self) -> "Sequence[Strategy]":
        """The strategy and its companions, the main one first."""
        return (self,)

    def plan(self, stream: Stream, t: int) -> Plan | None:
        """What task ``t`` trains on, how long and from where; None skips the task. Changes nothing.

        With 0 epochs the task is set up, collected, consolidated and evaluated all the same.
        """
        return Plan(stream[t].train)

    def modules(self, learner: Learner) -> Mapping[str, nn.Module]:
        """Modules of its own that outlive a task: adapters, prompts, further heads, by name.

        A pure function of the strategy's state, asked whenever that may have changed: before and
        after :meth:`setup`, after :meth:`consolidate` and when a state was loaded. A module whose
        name was there before stays as it is; one whose name is new joins with the weights that it
        was made with, for which random numbers are the run's. They train unless held, belong to
        checkpoints and, in a federation, to the server's weights, and are no layers of the network
        to others. ``learner.extras(self)`` gives them back.
        """
        return {}

    def check(self, learner: Learner) -> None:
        """Before anything starts: ``UsageError`` if the network lacks what an option names."""

    def check_elsewhere(self, promised: bool = False) -> None:
        """Before it works in somebody else's loop: ``UsageError`` if it needs ours.

        Args:
            promised: by the loop's owner, that the loss reaches weights through their layers'
                forward passes alone.
        """

    def guarded(self, learner: Learner) -> frozenset[str] | None:
        """Names of the parameters whose changes old tasks limit: projected, or frozen later on.

        What else trains is told to the user. None where a strategy makes no such difference: it
        lets everything change, or pulls at everything, or freezes what it says it freezes.

        Raises:
            UsageError: a parameter that it should guard is used in a way that it cannot.
        """
        return None

    def remarks(self, learner: Learner) -> Sequence[str]:
        """Lines for people at the start: what it chose by itself, for want of an option."""
        return ()

    def footprint(self, learner: Learner, tasks: int, processes: int) -> Memory | None:
        """The memory that it will take in the last task; None where it does not say.

        Asked before anything is loaded, of a network that may have shapes and no numbers.

        Args:
            learner: what will learn.
            tasks: how many there are.
            processes: that share the weights out; 1 where nobody does.
        """
        return None

    def setup(self, learner: Learner, task: Task) -> None:
        """Before the optimizer exists: freeze, attach, open a trust region.

        Replayed on resume from what learner and strategy were when the task began; then
        :meth:`load_state_dict` restores what training has changed since.
        """

    def param_groups(self, learner: Learner) -> Iterable[dict[str, Any]]:
        """Parameter groups for the optimizer."""
        return [{"params": learner.trainable_parameters()}]

    def on_batch(self, learner: Learner, batch: Batch) -> Batch:
        """The batch that is learned: replay adds to it here."""
        return batch

    def observe(self, learner: Learner, batch: Batch) -> bool:
        """Learn one batch of a stream that is tested first, in closed form and outside of SGD.

        False leaves it to the engine, which takes one optimizer step.
        """
        return False

    def objective(self, learner: Learner, batch: Batch, out: Tensor) -> Loss:
        """What is minimised, in place of the learner's loss; without side effects.

        Called for validation data too.

        Args:
            learner: what learns.
            batch: what :meth:`on_batch` gave, or this process's part of it.
            out: the learner's outputs for it.
        """
        return learner.total_loss(out, batch)

    def penalty(self, learner: Learner, batch: Batch, out: Tensor) -> Tensor | None:
        """A scalar that joins the loss, or None."""
        return None

    def constrain(self, learner: Learner) -> None:
        """Rewrite gradients: they are synchronised, unscaled and fully accumulated here."""

    def after_step(self, learner: Learner, batch: Batch, out: Tensor) -> None:
        """The weights have just moved."""

    def after_epoch(self, learner: Learner, task: Task, progress: Progress) -> EpochDecision | None:
        """Relax, change the rate, stop."""
        return None

    def phases(self, learner: Learner, task: Task) -> Sequence[Phase]:
        """What is trained after the task's own training and before :meth:`collect`, in order.

        A pure function of the strategy's state, asked again on resume.
        """
        return ()

    def collect(self, learner: Learner, task: Task) -> Statistics:
        """What this process measured about the finished task, as things that can be added up."""
        return {}

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """Take the summed statistics into memory: bases, Fisher information, merges."""

    def inference(self, learner: Learner, task: Task | None) -> AbstractContextManager[None]:
        """Around the evaluation of a task's data, once; None where the task id is not known."""
        return nullcontext()

    def predict(self, learner: Learner, batch: Batch, task: Task | None) -> Tensor:
        """What answers at test, in the form of the learner's outputs; ``task`` as above."""
        return learner(batch)

    def release(self, learner: Learner) -> None:
        """Undo what :meth:`setup` attached to the network."""

    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Numbers per layer after a task: ``{layer: {quantity: value}}``.

        Two quantities are looked at while a run goes on: ``rank`` of a subspace, which is shown,
        and ``capacity_left``, the share of a layer's inputs that is still free to learn from; a
        federation warns of layers that have little.
        """
        return {}

    def state_dict(self) -> State:
        """Everything a later task needs, as tensors and plain values."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""


def overrides(strategy: Strategy, hook: str) -> bool:
    """Whether the strategy (or any companion inside it) does something in ``hook``."""
    return any(
        getattr(type(m), hook) is not getattr(Strategy, hook) and hook not in m.idle
        for m in strategy.members
    )


def penalises_weights(strategy: Strategy) -> bool:
    """Whether the strategy (or any companion inside it) adds a penalty on the network's weights."""
    return any(m.penalises_weights and overrides(m, "penalty") for m in strategy.members)
