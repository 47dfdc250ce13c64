"""Around other people's optimizer steps: which are seen, and where gradients are constrained."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from cl_bench.contracts import UsageError

Moves = Callable[[Optimizer], bool]
"""Whether an optimizer holds parameters of the model."""


class Watcher(Protocol):
    """Who watches steps: which optimizers, and how many there were."""

    steps: int
    stepping: bool
    called: set[str]

    def attach(self, optimizer: Optimizer) -> None:
        """Watch its steps."""

    def attached(self, optimizer: Optimizer) -> bool:
        """Whether its steps are watched."""


def constrained(constrain: Callable[[], None], args: Any, kwargs: Any) -> Any:
    """Arguments of ``optimizer.step`` with which gradients are constrained once they are there.

    That is now, or inside the closure; None leaves the arguments as they are.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        constrain()
        return None

    def evaluated() -> Any:
        loss = closure()
        constrain()
        return loss

    if len(args) > 1:
        return (args[0], evaluated, *args[2:]), kwargs
    return args, {**kwargs, "closure": evaluated}


def check_optimizers(optimizers: Sequence[Optimizer], moves: Moves) -> None:
    """Each is one, and moves the model's weights."""
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise UsageError(
                f"{type(optimizer).__name__} is no torch.optim.Optimizer: give the optimizer "
                "whose step moves the model's weights"
            )
        if not moves(optimizer):
            raise UsageError(
                f"{type(optimizer).__name__} holds none of the model's parameters: build it on "
                "model.parameters()"
            )


@contextmanager
def only_through(session: Watcher, given: bool, moves: Moves) -> Iterator[None]:
    """Watch optimizers that are built inside; refuse weight changes that nobody saw."""
    steps_before: dict[int, int] = {}

    def enter(optimizer: Optimizer, *_: Any) -> None:
        steps_before[id(optimizer)] = session.steps
        new = not (session.stepping or session.attached(optimizer))
        built_inside = not given or "param_groups" in session.called
        if new and built_inside and moves(optimizer):
            session.attach(optimizer)  # the hooks of its own come after this one

    def leave(optimizer: Optimizer, *_: Any) -> None:
        # An optimizer that wraps a given one is seen through that one.
        unseen = session.steps == steps_before.get(id(optimizer))
        if unseen and not session.attached(optimizer) and moves(optimizer):
            raise UsageError(
                f"{type(optimizer).__name__}, which the task was not given, moved the model's "
                "weights: give every optimizer, guard.task(first, second, sample=...)"
            )

    handles = [
        register_optimizer_step_pre_hook(enter),
        register_optimizer_step_post_hook(leave),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
