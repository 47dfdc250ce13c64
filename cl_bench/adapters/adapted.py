"""Training adapters in place of weights: what goes on from task to task, and what stays.

While a task trains, adapters stand around layers and everything else is frozen. Between tasks
there are none: the network is a plain one under its own names, with the adapters merged into it,
so that whoever looks at it, tests or exports it sees what was learned.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from cl_bench.adapters.attached import Attached, plain_start
from cl_bench.contracts import (
    Learner,
    State,
    Statistics,
    Strategy,
    Task,
    UsageError,
)
from cl_bench.subspace import LinearMap, shared_out

Lifetime = Literal["per_task", "shared"]
End = Literal["merge", "keep", "reset"]


class Adapted(Strategy):
    """Adapters on frozen layers.

    Args:
        lifetime: ``per_task``: every task begins with an adapter of its own; ``shared``: one goes
            on through all of them.
        end: of a task. ``merge``: the weights take the adapter up, and the next task begins there;
            ``keep``: the adapter is remembered beside the first weights, on which the next task
            begins, and between tasks the network is the first weights with the latest adapter;
            ``reset``: it is dropped, and the network is as before the task, heads apart.

    Raises:
        UsageError: a shared adapter that is not kept.

    Attributes:
        attached: the adapter that trains; None between tasks.
        first: with ``keep``, parameters of the adapted layers without adapters, by layer.
        kept: with ``keep``, tensors of adapters, by task or ``shared``.
    """

    def __init__(self, lifetime: Lifetime, end: End) -> None:
        if lifetime == "shared" and end != "keep":
            raise UsageError(
                f"adapter.end={end}: an adapter that goes on to the next task is neither merged "
                "nor reset before it; use adapter.end=keep, or adapter.lifetime=per_task"
            )
        self.lifetime, self.end = lifetime, end
        self.attached: Attached | None = None
        self.first: dict[str, dict[str, Tensor]] = {}
        self.kept: dict[str, dict[str, dict[str, Tensor]]] = {}
        self._before: dict[str, dict[str, Tensor]] = {}

    @property
    def adapters(self) -> int:
        """Those of tasks that are tested with their own."""
        return len(self.kept) if (self.lifetime, self.end) == ("per_task", "keep") else 0

    @abstractmethod
    def maps(self, learner: Learner) -> Sequence[LinearMap]:
        """The layers that get adapters."""

    @abstractmethod
    def make(self, learner: Learner) -> Any:
        """The adapter's configuration."""

    def key(self, task: Task) -> str:
        """What the task's adapter is kept as."""
        return "shared" if self.lifetime == "shared" else f"task{task.index}"

    def called(self, task: Task) -> str:
        """What it is called in parameters' names: alike, where one may stand in another's place."""
        return "shared" if self.end == "keep" else f"task{task.index}"

    def looked(self, learner: Learner, task: Task) -> Mapping[str, Tensor]:
        """What the start reads beside weights, before anything is frozen."""
        return {}

    def drawing(self, learner: Learner, task: Task) -> AbstractContextManager[None]:
        """Around whatever is drawn at random for a task's adapter."""
        return nullcontext()

    def attach(
        self, learner: Learner, task: Task, config: Any, seen: Mapping[str, Tensor]
    ) -> Attached:
        """The task's adapter on every target."""
        return Attached(learner.network, self.maps(learner), config, self.called(task), seen)

    def setup(self, learner: Learner, task: Task) -> None:
        """Freeze the network; put the task's adapter on every target."""
        known = self.key(task) in self.kept
        if self.first:
            self._put(learner, self.first)
        seen = {} if known else self.looked(learner, task)
        self._freeze(learner)
        if self.end == "reset":
            self._before = self._own_weights(learner)
        self.attached = self._attach(learner, task, seen, known)
        if known:
            self.attached.load(self.kept[self.key(task)])
        elif self.end == "keep" and not self.first:
            self.first = self._own_weights(learner)

    def _attach(
        self, learner: Learner, task: Task, seen: Mapping[str, Tensor], known: bool
    ) -> Attached:
        learned = [p for p in learner.network.parameters() if p.requires_grad]
        config = self.make(learner)
        with self.drawing(learner, task):
            attached = self.attach(learner, task, plain_start(config) if known else config, seen)
        for parameter in learned:
            parameter.requires_grad_(True)
        return attached

    def _freeze(self, learner: Learner) -> None:
        """All but the heads that a classifier brings; those of a language model are its own."""
        heads = {name for name, role in learner.roles().items() if role == "head"}
        own = learner.modality != "text"
        named = learner.network.named_parameters()
        learner.hold_others([p for n, p in named if own and n in heads], norms=False)

    def _own_weights(self, learner: Learner) -> dict[str, dict[str, Tensor]]:
        """Copies of the target layers' own parameters."""
        return {
            m.name: {k: p.detach().clone() for k, p in m.module.named_parameters(recurse=False)}
            for m in self.maps(learner)
        }

    @torch.no_grad()
    def _put(self, learner: Learner, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Inverse of :meth:`_own_weights`."""
        for m in self.maps(learner):
            for name, parameter in m.module.named_parameters(recurse=False):
                parameter.copy_(shared_out(values[m.name][name], parameter))

    def consolidate(self, learner: Learner, task: Task, stats: Statistics) -> None:
        """Remember the adapter."""
        if self.end == "keep" and self.attached is not None:
            self.kept[self.key(task)] = self.attached.state()

    def release(self, learner: Learner) -> None:
        """Merge the adapter, or drop it."""
        if self.attached is None:
            return
        if self.end == "reset":
            self.attached.drop()
            self._put(learner, self._before)
        else:
            self.attached.merge()
        self.attached, self._before = None, {}

    @contextmanager
    def as_after(self, learner: Learner, task: Task) -> Iterator[None]:
        """Inside, the network is the first weights with the adapter that ``task`` has left."""
        kept = self.kept[self.key(task)]
        if self.attached is not None:  # in the middle of another task
            with self.attached.instead(kept):
                yield
            return
        latest = self._own_weights(learner)
        self._put(learner, self.first)
        learned = [p for p in learner.network.parameters() if p.requires_grad]
        attached = self._attach(learner, task, {}, known=True)
        try:
            attached.load(kept)
            yield
        finally:
            attached.drop()
            self._put(learner, latest)
            for parameter in learned:
                parameter.requires_grad_(True)

    def state_dict(self) -> State:
        """The first weights and all adapters that are kept."""
        return {"first": _copied(self.first), "kept": {k: _copied(v) for k, v in self.kept.items()}}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.first = _copied(state["first"])
        self.kept = {k: _copied(v) for k, v in state["kept"].items()}


def _copied(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {name: dict(own) for name, own in tensors.items()}
