"""Everything that a run would lose with its process: taken apart, and put back.

A checkpoint holds the run twice where it lies inside a task. What a strategy attaches to a network
in ``setup`` may depend on all that the run was when the task began (weights before the task, bases
found so far), so ``setup`` is replayed from that; then what training has changed since is loaded.
Tensors that are the same in both are stored once.
"""

import random
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cl_bench.contracts import State, Strategy, UsageError
from cl_bench.experiment.checkpoint import FORMAT, Checkpoint, Checkpoints
from cl_bench.experiment.observer import Observer
from cl_bench.learners import BaseLearner
from cl_bench.parallel.ranks import gathered, rank, world
from cl_bench.parallel.sharding import collected
from cl_bench.parallel.stored import Stored, resolved
from cl_bench.subspace import Owned
from cl_bench.tracking import Record


class Stateful(Protocol):
    """Whatever can be taken apart into plain values."""

    def state_dict(self) -> State:
        """Tensors and plain values."""

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""


class RunState:
    """The parts of a run that move, and their checkpoints.

    Args:
        learner: what learns.
        strategy: which updates are allowed.
        observer: watches the run from the side; None means nobody does.
        record: whose position a checkpoint keeps.
        checkpoints: where they go; None writes none.

    Attributes:
        optimizer_steps: taken in the tasks before the current one.
        largest: bytes of the tensors in the largest checkpoint so far.
        inside: where training stood, for the task that a resumed run begins in; :meth:`resume_task`
            takes it.
        engine: what of the engine outlives a task, if anything does.
        stream: whose data may come about while it is learned, if that is known.
    """

    def __init__(
        self,
        learner: BaseLearner,
        strategy: Strategy,
        observer: Observer | None,
        record: Record,
        checkpoints: Checkpoints | None,
    ) -> None:
        self.learner = learner
        self.strategy = strategy
        self.observer = observer
        self.record = record
        self.checkpoints = checkpoints
        self.optimizer_steps = 0
        self.largest = 0
        self.inside: State | None = None
        self.engine: Stateful | None = None
        self.stream: Stateful | None = None
        self._start: State = {}

    @property
    def every_steps(self) -> float:
        """Optimizer steps between two checkpoints inside a task."""
        if not self.learner.resumes_inside:
            return float("inf")
        settings = self.checkpoints.settings if self.checkpoints else None
        return settings.every_steps or float("inf") if settings else float("inf")

    def save_between(self, task: int) -> None:
        """Write the checkpoint from which the task with index ``task`` begins."""
        if self.checkpoints is None:
            return
        # First the weights: wherever a run is resumed, those of the rows before are there.
        if self.checkpoints.settings.weights == "all":
            content = self.checkpoints.save_weights(task, self.learner.saved_weights())
            if content is not None:
                file = self.checkpoints.weights.path(task).relative_to(self.record.directory)
                self.record.weights(task, file.as_posix(), content)
        parts = {**self._parts(), "optimizer_steps": self.optimizer_steps}
        if self.learner.sharded:  # of what is shared out, the files remember how it was
            start = self._save(task, 0, {"start": plain(parts, ""), "inside": None}, counts=True)
            self._start = copied(start["start"])
            return
        self._start = copied(parts)
        self._save(task, 0, {"start": self._start, "inside": None}, counts=True)

    def save_inside(self, task: int, step: int, training: State, scheduled: bool) -> None:
        """Write a checkpoint inside a task.

        Args:
            task: its index.
            step: batches learned in it.
            training: optimizer and position, for :meth:`resume_task` to give back.
            scheduled: whether it belongs to every run of this configuration; one that a signal
                asked for does not count for :attr:`largest`.
        """
        inside = plain({**self._parts(), **training}, "")
        self._save(task, step, {"start": sharing(self._start, inside), "inside": inside}, scheduled)

    def _save(self, task: int, step: int, state: State, counts: bool) -> State:
        assert self.checkpoints is not None
        self.record.require_lock()
        saved = self.checkpoints.save(
            task,
            step,
            {
                "format": FORMAT,
                "task": task,
                "step": step,
                **state,
                "random": gathered(random_states()) if world() > 1 else random_states(),
                "position": self.record.position,
                "chain": self.record.chain,
                "wall_seconds": self.record.wall_seconds,
                "largest": self.largest,
                "counts": counts,
                "checkpoint_seconds": self.checkpoints.seconds,
            },
        )
        if counts:
            held = {"start": saved["start"], "inside": saved["inside"]}
            self.largest = max(self.largest, tensor_bytes(held))
        return saved

    def restore(self, found: Checkpoint) -> int:
        """Put the run back to where a checkpoint's task began.

        Returns:
            The index of the task to go on with.
        """
        state = found.state
        self._start = state["start"]
        self._load(self._start)
        self.optimizer_steps = self._start["optimizer_steps"]
        held = {"start": self._start, "inside": state["inside"]}
        self.largest = max(state["largest"], tensor_bytes(held) if state["counts"] else 0)
        if self.checkpoints:
            self.checkpoints.seconds = state["checkpoint_seconds"]
        mine = _of_this_process(state["random"])
        set_random_states(mine)
        if state["inside"] is not None:
            self.inside = {**state["inside"], "random": mine}
        return int(state["task"])

    def resume_task(self) -> State | None:
        """Once ``setup`` was replayed: load what training has changed since the task began.

        Returns:
            What :meth:`save_inside` was given, and the random states; None if the task begins now.
        """
        inside, self.inside = self.inside, None
        if inside is not None:
            self._load(inside)
        return inside

    def _parts(self) -> State:
        came = self.stream.state_dict() if self.stream else {}
        return {
            **({"stream": came} if came else {}),
            "weights": self.learner.own_weights(),
            "learner": self.learner.progress_state(),
            "strategy": collected(self.strategy.state_dict()),
            "observer": self.observer.state_dict() if self.observer else {},
            "engine": self.engine.state_dict() if self.engine else {},
        }

    def _load(self, state: State) -> None:
        # Copies: a strategy may go on writing into the tensors it is given.
        parts = ("weights", "learner", "strategy", "observer", "engine", "stream")
        state = copied({k: state[k] for k in parts if k in state})
        # Modules follow from what the strategy remembers, and their weights are among the weights.
        self.strategy.load_state_dict(resolved(state["strategy"], self.learner.mesh))
        self.learner.equip(self.strategy)
        self.learner.load_weights(state["weights"])
        self.learner.load_progress_state(state["learner"])
        if self.observer:
            self.observer.load_state_dict(state["observer"])
        if self.engine:
            self.engine.load_state_dict(state["engine"])
        if self.stream and "stream" in state:
            self.stream.load_state_dict(state["stream"])


def _of_this_process(random: Any) -> State:
    everyones = random if isinstance(random, list) else [random]
    if len(everyones) != world():
        return random_states()  # nobody drew for so many: dropout goes on with other numbers
    return everyones[rank()]  # type: ignore[no-any-return]


def random_states() -> State:
    """Of every generator that training may draw from."""
    version, numbers, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=True)
    _, keys, position, has_gauss, cached = numpy
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, torch.tensor(numbers), gauss],
        "numpy": [torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
    }


def set_random_states(state: State) -> None:
    """Inverse of :func:`random_states`; a CUDA device that is no longer there is left out."""
    torch.set_rng_state(state["torch"].cpu())
    for device, value in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(value.cpu(), device)
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(
        ("MT19937", keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached)
    )


def plain(value: Any, where: str) -> Any:
    """``value`` in plain dictionaries and lists, its tensors detached.

    Raises:
        UsageError: something in it could not be loaded with ``weights_only``; says which.
    """
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        found = {k: plain(v, f"{where}.{k}" if where else str(k)) for k, v in value.items()}
        return Owned(found) if isinstance(value, Owned) else found
    if isinstance(value, list | tuple):
        return type(value)(plain(v, f"{where}[{i}]") for i, v in enumerate(value))
    if value is None or type(value) in (bool, int, float, complex, str, bytes, Stored):
        return value
    raise UsageError(
        f"the state {where} is a {type(value).__qualname__}: state_dict may return tensors, "
        "numbers, strings, None, and lists, tuples and dictionaries of those"
    )


def copied(state: State) -> State:
    """A deep copy of :func:`plain` values.

    Tensors keep their strides, which decide on rounding; one that occurs twice is copied once.
    """
    known: dict[Any, Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.is_sparse or value.numel() == 0 or isinstance(value, DTensor):
                return value.clone()
            key = (value.data_ptr(), value.dtype, value.shape, value.stride())
            if key not in known:
                known[key] = _as_strided(value)
            return known[key]
        if isinstance(value, dict):
            return type(value)((k, copy(v)) for k, v in value.items())
        if isinstance(value, list | tuple):
            return type(value)(map(copy, value))
        return value

    return copy(plain(state, ""))  # type: ignore[no-any-return]


def _as_strided(value: Tensor) -> Tensor:
    if 0 in value.stride():
        return value.clone()
    return torch.empty_strided(
        value.shape, value.stride(), dtype=value.dtype, device=value.device
    ).copy_(value)


def sharing(old: Any, new: Any) -> Any:
    """``old`` with the tensors of ``new`` wherever they are the same, bit for bit."""
    if isinstance(old, Tensor):
        return new if isinstance(new, Tensor) and _identical(old, new) else old
    if isinstance(old, dict) and isinstance(new, dict):
        return {k: sharing(v, new.get(k)) for k, v in old.items()}
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [sharing(a, b) for a, b in zip(old, new, strict=True)]
    return old


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in a nested value, here or stored, each counted once."""
    found: dict[Any, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            found[value.data_ptr(), value.nbytes] = value.nbytes
        elif isinstance(value, Stored):
            found[value] = value.nbytes
        elif isinstance(value, dict):
            for inner in value.values():
                visit(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                visit(inner)

    visit(value)
    return sum(found.values())


def _identical(a: Tensor, b: Tensor) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and a.device == b.device
        and a.dim() > 0
        and a.is_contiguous()
        and b.is_contiguous()
        and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
    )
