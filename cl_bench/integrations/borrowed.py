"""Somebody else's network, seen through the learner's services; it is left as it was found."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cl_bench.contracts import Batch, Position, Protect, Scenario, Strategy, Task, UsageError
from cl_bench.contracts.plan import Start
from cl_bench.integrations.heads import OwnHeads, find_heads
from cl_bench.integrations.outputs import Forward, LossFunction, Outputs, labels_of
from cl_bench.integrations.protected import Protected
from cl_bench.learners.guards import guards
from cl_bench.learners.modes import own_buffers, same_modes
from cl_bench.learners.work import Work
from cl_bench.parallel.sharding import is_sharded
from cl_bench.subspace import Accumulator, LinearMap, Moments


class Borrowed(Outputs, OwnHeads, Protected):
    """The services that strategies stand on, over any module.

    Args:
        model: the network.
        loss: mean loss from outputs and labels; for strategies that ask for gradients.
        forward: how the model is called; ``model(batch["x"])`` if None.
        seed: for samples that strategies draw.
        heads: shell patterns of the names of output layers, which together make its logits.
        scenario: what tasks bring and what is known at test time; None: ``class`` where there are
            several heads, else ``domain``.

    Raises:
        UsageError: the model is compiled, wrapped or shared out, so that its layers could not be
            watched, or a name fits no layer.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction | None,
        forward: Forward | None,
        seed: int,
        heads: Sequence[str] = (),
        scenario: Scenario | None = None,
    ) -> None:
        wrapped = getattr(model, "_orig_mod", None) or getattr(model, "_compiled_call_impl", None)
        if wrapped is not None or isinstance(model, nn.parallel.DistributedDataParallel):
            raise UsageError(
                f"{type(model).__name__} hides its layers: give the module itself, and train "
                "what torch.compile(module) or DistributedDataParallel(module) returned"
            )
        if is_sharded(model):
            raise UsageError(
                "processes share the model's weights out (FSDP), and strategies here need whole "
                "ones: let each process hold all of them (DistributedDataParallel)"
            )
        self._model, self._loss, self._forward = model, loss, forward
        self.seed = seed
        self.modality = ""
        self.batch_size = 64  # not known here; nothing but the size of pieces follows from it
        self.projectable: Literal["input", "gradient", "step"] = "step"
        self.strategy = self.acting = Strategy()
        self.phase, self.own_objective, self._before_phase = None, None, None
        self.held_norms: set[nn.Module] = set()
        self.optimizers: list[Optimizer] = []
        self.work = Work()
        self._initial: Mapping[str, Tensor] = {}
        self._learnable: set[nn.Parameter] = set()
        self._held: set[Tensor] = set()
        self._extras: dict[int, nn.ModuleDict] = {}
        self._announced = False
        self._left_alone: set[str] = set()
        self._begin_counting()
        self.task: Task | None = None
        self.test_tasks: list[Task] = []
        self._head_names = find_heads(model, heads)
        self.heads = nn.ModuleList(model.get_submodule(name) for name in self._head_names)
        several = len(self.heads) > 1
        self.scenario: Scenario = scenario or ("class" if several else "domain")
        self.task_id_at_test = self.scenario == "task"
        self.seen_heads = self.seen_classes = 0
        widths = [int(getattr(head, "weight").shape[0]) for head in self.heads]  # noqa: B009
        sizes = self.sizes = widths if several else []
        self.head_of_class = torch.arange(len(sizes)).repeat_interleave(
            torch.tensor(sizes, dtype=torch.long)
        )

    # -- a task -----------------------------------------------------------------------------------

    def open(self) -> None:
        """Remember what is trainable before a strategy freezes some of it."""
        self._learnable = set(self.trainable_parameters())
        self._learnable |= {p for e in self._extras.values() for p in e.parameters()}

    def begin(self, task: Task, strategy: Strategy, start: Start = "current") -> None:
        """Meet a task."""
        self.seen_classes = max(self.seen_classes, task.classes.stop)
        self.belongs(task)
        super().begin(task, strategy, start)

    def belongs(self, task: Task) -> None:
        """Take down whose the classes of a task are."""
        if not self.sizes:
            owner = torch.zeros(max(self.seen_classes, task.classes.stop), dtype=torch.long)
            owner[: len(self.head_of_class)] = self.head_of_class.cpu()
            owner[task.classes.start : task.classes.stop] = task.index
            self.head_of_class = owner
        self.head_of_class = self.head_of_class.to(next(self.parameters()).device)

    def announce(self, strategy: Strategy) -> None:
        """Warn, once, of what trains and ``strategy`` does not guard.

        Raises:
            UsageError: as :func:`guards`.
        """
        found = guards(strategy, self)
        forgotten = found is not None and any(
            name.rpartition(".")[0] not in self._left_alone for name in found.names
        )
        if found and forgotten and not self._announced:
            warnings.warn(
                f"{'; '.join(found.lines())}. Freeze what should not change, or say with "
                "Protect(exclude=...) that it may",
                stacklevel=2,
            )
        self._announced = True

    def guarded(self, protect: Protect) -> frozenset[str]:
        """As for every learner; what ``protect.exclude`` names is not announced."""
        layers = [name for name, _ in self._model.named_modules()]
        self._left_alone = {n for n in layers if any(fnmatchcase(n, p) for p in protect.exclude)}
        return super().guarded(protect)

    def clear_frozen(self) -> None:
        """An optimizer that already exists leaves parameters without a gradient where they are."""
        for parameter in self._learnable:
            if not parameter.requires_grad:
                parameter.grad = None

    def end(self) -> None:
        """Free again whatever was frozen or held since :meth:`open`, and take what was added."""
        for parameter in self._learnable:
            parameter.requires_grad_(True)
        self._free_norms(list(self.held_norms))
        self._learnable, self.optimizers = set(), []
        self._held.clear()
        self.phase, self._before_phase, self.open_heads = None, None, False
        if self._extras and hasattr(self._model, "extra"):
            del self._model.extra

    def accepts(self, sample: Batch) -> Tensor:
        """Outputs for the first rows of ``sample``.

        Raises:
            UsageError: the model does not take them.
        """
        rows = self._to_device({name: value[:2] for name, value in sample.items()})
        try:
            with torch.no_grad(), self.evaluating():
                return self._said(rows)
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(
                f"the model does not take the sample: {error}. Give sample=(x, y) such that "
                "model(x) works, or say how to call it: forward=lambda model, batch: ..."
            ) from error

    # -- the learner's contract -------------------------------------------------------------------

    @property
    def progress(self) -> Position:
        """Where training stands.

        Raises:
            UsageError: nobody said how long training goes on.
        """
        now = self._step
        if not (now.steps and now.epochs):
            raise UsageError(
                "this strategy asks how far training has come: say how long it goes on, "
                "guard.task(..., epochs=5, steps=5 * len(loader))"
            )
        epoch = min(now.step * now.epochs // now.steps, now.epochs - 1)
        return Position(now.phase, epoch, now.step, now.steps, now.epochs)

    @property
    def network(self) -> nn.Module:
        """The module whose layers strategies see."""
        return self._model

    @property
    def body(self) -> nn.Module:
        """The network without heads and wrappers that hold a single module."""
        body = self._model
        while True:
            inner = self._holding(body)
            if hasattr(body, "blocks") or len(inner) != 1 or isinstance(inner[0], nn.Linear):
                return body
            body = inner[0]

    def _holding(self, module: nn.Module) -> list[nn.Module]:
        """Children that hold parameters of other things than heads."""
        heads = self._head_parameters()
        extra = getattr(self._model, "extra", None)
        children = [m for m in module.children() if m is not extra or not self._extras]
        return [m for m in children if any(p not in heads for p in m.parameters())]

    def blocks(self) -> list[nn.Module]:
        """The layers of a model of transformers, the body's ``blocks``, or its children."""
        model = self._model
        while _depth(model) is None and len(inside := self._holding(model)) == 1:
            model = inside[0]  # a LightningModule around it, say
        depth = _depth(model)
        if depth is None:
            if hasattr(self.body, "blocks"):
                return super().blocks()
            return self._holding(self.body)
        config: Any = model.config
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
        found = [m for m in lists if len(m) == depth]
        wanted = 2 if getattr(config, "is_encoder_decoder", False) else 1
        return [block for stack in found[:wanted] for block in stack]

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Write weights and buffers into the network."""
        self._model.load_state_dict(weights)

    def _optimizing(self) -> Sequence[Optimizer]:
        return self.optimizers

    def _left_behind(self) -> dict[int, Any]:
        # Functions may belong to objects that hold much more than the network.
        kept = {id(self._forward): self._forward, id(self._loss): self._loss}
        empty: list[Any] = [self.held_norms, self.test_tasks, self._losses, self._terms]
        empty += [self.work, self._step, self.optimizers]
        return {
            **super()._left_behind(),
            **{id(value): type(value)() for value in empty},
            **kept,
            id(self.strategy): Strategy(),
            id(self.acting): Strategy(),
            id(self.own_objective): None,
            id(self.task): self.task,
        }

    def predictions(self, out: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The outputs (n, classes) and the labels (n,)."""
        return out, labels_of(batch)

    def own_answers(self, batch: Batch, temperature: float, generator: torch.Generator) -> Batch:
        """Refused: how the model is asked is known to the owner of the loop."""
        raise UsageError(
            "the model's own answers cannot be had in a loop of yours; use +stream=chat in ours"
        )

    def learns(self, parameter: nn.Parameter) -> bool:
        """As it was when the task began: a strategy may have frozen it since."""
        return parameter in self._learnable if self._learnable else parameter.requires_grad

    def tap(
        self,
        layers: Sequence[LinearMap],
        batches: Iterable[Batch],
        into: Mapping[str, Accumulator] | None = None,
        dropout: bool = False,
    ) -> Mapping[str, Moments]:
        """Second moments of the layers' inputs over the batches, in evaluation mode.

        Raises:
            UsageError: the inputs reached none of the layers.
        """
        moments = super().tap(layers, batches, into, dropout)
        if not any(inputs.samples for inputs in moments.values()):
            raise UsageError(
                "the sample reached none of the protected layers: is the network called by "
                "model(x)? If not, say how: forward=lambda model, batch: ..."
            )
        return moments

    def example(self) -> Batch:
        """Nobody shows a sample before the first batch."""
        raise UsageError("this strategy looks at a sample of the stream, which is not known here")

    def reset_weights(self) -> None:
        """Back to the weights of before the first task.

        Raises:
            UsageError: they were not kept, as the strategy chooses no training data.
        """
        if not self._initial:
            raise UsageError("this strategy starts afresh, from weights that are not known here")
        super().reset_weights()

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The network's parameters."""
        return self._model.parameters(recurse)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with their names."""
        return self._model.named_parameters()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the network is in evaluation mode."""
        with same_modes(self._model):
            # Not by eval(): held norms would take that for what their owner asked of them.
            for module in self._model.modules():
                module.training = False
            yield

    @contextmanager
    def _as_in_training(self) -> Iterator[None]:
        with same_modes(self._model), own_buffers(self._model):
            if not self._model.training:
                for module in self._model.modules():  # not by train(), as in evaluating
                    module.training = module not in self.held_norms
            yield


def _depth(model: nn.Module) -> int | None:
    """How many layers a model of transformers has; None for other modules."""
    return getattr(getattr(model, "config", None), "num_hidden_layers", None)
