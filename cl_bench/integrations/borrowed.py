"""Somebody else's network, seen through the learner's services; it is left as it was found."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cl_bench.contracts import Batch, Position, Protect, Strategy, UsageError
from cl_bench.contracts.learner import Heads
from cl_bench.learners import NetworkServices
from cl_bench.learners.guardable import is_norm, require_guardable
from cl_bench.learners.guards import guards
from cl_bench.learners.modes import own_buffers, same_modes
from cl_bench.subspace import Accumulator, LinearMap, Moments

Forward = Callable[[Any, Batch], Tensor]
"""Outputs of a model for a batch ``{"x": ..., "y": ...}``."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Mean loss from outputs and labels, as ``torch.nn.functional.cross_entropy``."""


class Borrowed(NetworkServices):
    """The services that strategies stand on, over any module.

    Args:
        model: the network.
        loss: mean loss from outputs and labels; for strategies that ask for gradients.
        forward: how the model is called; ``model(batch["x"])`` if None.
        seed: for samples that strategies draw.

    Raises:
        UsageError: the model is compiled or wrapped, so that its layers could not be watched.
    """

    batch_size = 1
    """Not known in somebody else's loop. It prices input-side projection, never chosen there."""

    def __init__(
        self, model: nn.Module, loss: Loss | None, forward: Forward | None, seed: int
    ) -> None:
        wrapped = getattr(model, "_orig_mod", None) or getattr(model, "_compiled_call_impl", None)
        if wrapped is not None or isinstance(model, nn.parallel.DistributedDataParallel):
            raise UsageError(
                f"{type(model).__name__} hides its layers: give the module itself, and train "
                "what torch.compile(module) returned"
            )
        self._model = model
        self._loss = loss
        self._forward = forward
        self.seed = seed
        self.projectable: Literal["input", "gradient", "step"] = "step"
        self.held_norms: set[nn.Module] = set()
        self.optimizers: list[Optimizer] = []
        self._learnable: list[nn.Parameter] = []
        self._announced = False
        self._left_alone: set[str] = set()

    def begin(self) -> None:
        """Remember what is trainable before a strategy freezes some of it."""
        self._learnable = list(self.trainable_parameters())

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
        """Free again whatever was frozen or held since :meth:`begin`."""
        for parameter in self._learnable:
            parameter.requires_grad_(True)
        for norm in self.held_norms:
            del norm.__dict__["train"]
            norm.training = norm.__dict__.pop("mode_asked_for")
        self._learnable, self.optimizers = [], []
        self.held_norms.clear()

    def accepts(self, sample: Batch) -> None:
        """Raise :class:`UsageError` unless the model takes the first rows of ``sample``."""
        rows = self._to_device({name: value[:2] for name, value in sample.items()})
        try:
            with torch.no_grad(), self.evaluating():
                self(rows)
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
        """Raise :class:`UsageError`: epochs are not known in somebody else's loop."""
        raise UsageError(
            "this strategy asks how far training has come, which is not known in somebody else's "
            "loop: run it in cl_bench's own"
        )

    @property
    def network(self) -> nn.Module:
        """The module whose layers strategies see."""
        return self._model

    @property
    def body(self) -> nn.Module:
        """The network without wrappers that hold a single module, such as a LightningModule."""
        body = self._model
        while True:
            inner = [m for m in body.children() if any(True for _ in m.parameters())]
            if hasattr(body, "blocks") or len(inner) != 1 or isinstance(inner[0], nn.Linear):
                return body
            body = inner[0]

    def __call__(self, batch: Batch, head: int | None = None) -> Tensor:
        """Outputs for a batch.

        Raises:
            UsageError: a certain head is wanted, or nothing says how to call the model.
        """
        if head is not None:
            raise UsageError("which head serves a task is not known in somebody else's model")
        if self._forward is not None:
            return self._forward(self._model, batch)
        if "x" not in batch:
            raise UsageError(
                f"the sample has {', '.join(batch)} but no 'x': say how the model is called, "
                "for example forward=lambda model, batch: model(**batch).logits"
            )
        out: Tensor = self._model(batch["x"])
        return out

    def weights(self) -> dict[str, Tensor]:
        """Weights and buffers, live."""
        return self._model.state_dict()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Write weights and buffers into the network."""
        self._model.load_state_dict(weights)

    def _optimizing(self) -> Sequence[Optimizer]:
        return self.optimizers

    def _left_behind(self) -> dict[int, Any]:
        # Functions may belong to objects that hold much more than the network.
        kept = {id(self._forward): self._forward, id(self._loss): self._loss}
        return {**kept, id(self.optimizers): []}

    def _features(self, batch: Batch) -> Tensor:
        raise UsageError(
            "this strategy asks for what the output layer reads, and which layer that is is not "
            "known in somebody else's model: run it in cl_bench's own loop"
        )

    def readout(self, features: Tensor, heads: Heads = "seen") -> Tensor:
        """Raise :class:`UsageError`: heads are not known in somebody else's model."""
        return self._features({})

    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        """Mean loss over the batch.

        Raises:
            UsageError: no loss was given.
        """
        if self._loss is None:
            raise UsageError("this strategy needs the loss: give loss=F.cross_entropy (or yours)")
        return self._loss(out, _labels(batch))

    def label_logits(self, out: Tensor, batch: Batch) -> Tensor:
        """Logit of every sample's own label (n,)."""
        return out.gather(1, _labels(batch).unsqueeze(1)).squeeze(1)

    def performance(self, batch: Batch) -> float:
        """Share of the batch whose most likely class is right."""
        batch = self._to_device(batch)
        with torch.no_grad(), self.evaluating():
            return float((self(batch).argmax(1) == _labels(batch)).double().mean())

    def draw_labels(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with labels drawn from the model's own predictions."""
        with torch.no_grad(), self.evaluating():
            likelihood = self(self._to_device(batch)).softmax(1).cpu()
        drawn = torch.multinomial(likelihood, 1, generator=generator).squeeze(1)
        return {**batch, "y": drawn.to(_labels(batch).device)}

    def predictions(self, out: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The outputs (n, classes) and the labels (n,)."""
        return out, _labels(batch)

    def own_answers(self, batch: Batch, temperature: float, generator: torch.Generator) -> Batch:
        """Refused: how the model is asked is known to the owner of the loop."""
        raise UsageError(
            "the model's own answers cannot be had in a loop of yours; use +stream=chat in ours"
        )

    def learns(self, parameter: nn.Parameter) -> bool:
        """As it was when the task began: a strategy may have frozen it since."""
        inside = self._learnable or [p for p in self._model.parameters() if p.requires_grad]
        return any(parameter is p for p in inside)

    def counted(self, batch: Batch, layer: str) -> Tensor | None:
        """Which tokens (n, L) are no padding, if the sample says so as Hugging Face's models do."""
        mask = batch.get("attention_mask")
        return None if mask is None else mask.bool()

    def layers(self, protect: Protect) -> list[LinearMap]:
        """The linear maps that ``protect`` selects.

        Raises:
            UsageError: there are none, or no subspace of inputs can guard one of them.
        """
        found = super().layers(protect)
        if not found:
            raise UsageError(
                f"{type(self._model).__name__} has no linear or convolutional layer to protect: "
                "build the network in its constructor, not later"
            )
        require_guardable(self._model, found)
        return found

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

    def is_guarded_head(self, name: str, heads: str) -> bool | None:
        """Unknown: a head is a layer like any other here.

        Raises:
            UsageError: heads are to be left alone.
        """
        if heads == "never":
            raise UsageError(
                "protect.heads='never': which layers are heads is not known in somebody else's "
                "model; name them, for example Protect(exclude=('head*',))"
            )
        return None

    def hold(self, modules: Iterable[nn.Module]) -> None:
        """Until the end of the task: no gradients, running statistics held."""
        for module in modules:
            module.requires_grad_(False)
            for norm in module.modules():
                if is_norm(norm) and norm not in self.held_norms:
                    self.held_norms.add(norm)
                    _stay_in_eval(norm, norm.training)
                    # The user's own model.train() comes later. Forward hooks would not do: a
                    # compiled network ignores those that are registered after its compilation.
                    norm.__dict__["train"] = partial(_stay_in_eval, norm)

    def train_heads(self, which: Literal["current", "seen", "all"]) -> None:
        """Raise :class:`UsageError`: heads are not known in somebody else's model."""
        raise UsageError(
            "this strategy chooses heads, and which layers are heads is not known here"
        )

    def reset_weights(self) -> None:
        """Raise :class:`UsageError`: the weights of construction are not known."""
        raise UsageError("this strategy starts afresh, from weights that are not known here")

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The network's parameters."""
        return self._model.parameters(recurse)

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


def _stay_in_eval(norm: nn.Module, mode: bool = True) -> nn.Module:
    norm.__dict__["mode_asked_for"] = mode
    norm.training = False
    return norm


def _labels(batch: Batch) -> Tensor:
    if "y" not in batch:
        raise UsageError("this strategy needs labels: give sample=(x, y)")
    return batch["y"]
