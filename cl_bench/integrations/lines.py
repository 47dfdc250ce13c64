"""The lines that a strategy asks of somebody else's loop, and what no line can give."""

from typing import Any

from cl_bench.contracts import Plan, Strategy, UsageError
from cl_bench.contracts.strategy import overrides

LINES = {
    "plan": "train on what the strategy chose, `with guard.task(...) as lesson:` and lesson.data",
    "on_batch": "batch = guard.on_batch(batch), before the model sees it",
    "objective": "loss = guard.objective(batch, out), in place of your own loss",
    "penalty": "loss = loss + guard.penalty(batch, out)",
    "param_groups": "optimizer = SGD(guard.param_groups(), lr=...), inside `with guard.task(...)`",
    "after_epoch": "guard.after_epoch(), at the end of every epoch",
    "phases": "for phase in guard.phases(): ..., behind the epochs of the task",
}
"""What the loop calls, by the hook that a strategy has."""


def require_served(strategy: Strategy, heads: object = (), inputs: bool = False) -> None:
    """Raise :class:`UsageError` if the strategy needs what somebody else's loop cannot give."""
    if not isinstance(strategy, Strategy):
        raise UsageError(f"strategy={strategy!r}: give an object, such as GPM(threshold=0.95)")
    name, needs = type(strategy).__name__, strategy.needs
    wanted = []
    if "local" not in needs.engines:
        wanted.append("runs in a federation")
    if needs.plateau:
        wanted.append("waits until the loss on validation data has reached a plateau")
    if wanted:
        raise UsageError(
            f"{name} {' and '.join(wanted)}, which somebody else's training loop leaves no room "
            "for: run it in cl_bench's own loop (python -m cl_bench +strategy=...), or use another"
        )
    if needs.scenarios and "domain" not in needs.scenarios and not heads:
        raise UsageError(
            f"{name} learns tasks that bring classes of their own, each with an output layer: name "
            "these in the order of the tasks, for example Guarded(..., heads=['heads.*'])"
        )
    for member in strategy.members:
        member.check_elsewhere(promised=inputs)


def require_classes(strategy: Strategy) -> None:
    """Raise :class:`UsageError` if the strategy learns classes alone: labels are tokens."""
    learned = strategy.needs.modalities
    if learned and "text" not in learned:
        raise UsageError(
            f"{type(strategy).__name__} learns classes, a label y for each sample, and this sample "
            "has tokens as labels: use a strategy for language models, such as EWC or ER"
        )


def require_trainer(strategy: Strategy) -> None:
    """Raise :class:`UsageError` if the strategy needs what a ready Trainer leaves no room for."""
    if overrides(strategy, "phases"):
        raise UsageError(
            f"{type(strategy).__name__} trains a task in phases, and a Trainer knows one: use a "
            "plain loop, `with guard.task(...)` and `for phase in guard.phases()`"
        )


def require_own_data(session: Any) -> None:
    """Raise :class:`UsageError` if the strategy chooses data that a ready Trainer does not have."""
    if "plan" in session.needed or not session.trains:
        raise UsageError(
            f"{type(session.strategy).__name__} chooses what is trained, and a Trainer has its "
            "data already: use a plain loop, `with guard.task(...) as lesson:` and lesson.data"
        )


class Lesson:
    """What a task trains on, and for how long.

    Attributes:
        epochs: as the strategy wants it, else as the loop said; None where neither did.
    """

    def __init__(self, session: Any, plan: Plan, epochs: int | None) -> None:
        self._session, self._plan = session, plan
        self.epochs = epochs if plan.epochs is None else plan.epochs

    @property
    def data(self) -> Any:
        """The samples, ``data[LongTensor] -> {name: tensor}``, and ``len(data)``."""
        self._session.called.add("plan")
        return self._plan.data
