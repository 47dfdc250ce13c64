"""The learner as a strategy sees it: services, no geometry."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from torch import Generator, Tensor, nn

from cl_bench.contracts.checking import checked
from cl_bench.contracts.loss import Loss
from cl_bench.contracts.stream import Batch

if TYPE_CHECKING:
    from cl_bench.subspace import Accumulator, LinearMap, Moments


@checked("protect.")
@dataclass(frozen=True)
class Protect:
    """Which parameters a subspace strategy guards; the same option for every such strategy.

    Args:
        include: shell patterns of layer names; empty means every linear or convolutional layer.
        exclude: shell patterns of layer names to leave alone.
        bias: ``free`` leaves biases alone, ``augmented`` protects [W | b] jointly by a constant
            input of 1 (exact), ``frozen`` trains them on the first task only.
        norm: affine parameters and running statistics of normalisation layers: ``free``, or
            ``frozen_after_first``.
        heads: ``auto`` leaves alone heads that are learned by one task each and guards others: one
            that tasks share, and those that together are the one head of a class-incremental
            stream, outputs of tasks to come included; ``always`` and ``never`` say so outright.
        embeddings: of tokens and positions, relative ones included, which no subspace of inputs
            guards: ``free``, or ``frozen_after_first``.
        tied: an embedding whose weight is an output head's too: ``project`` guards it as the
            head's, ``frozen_after_first`` and ``free`` do what they say; ``auto`` freezes that of a
            pre-trained network, and else projects.
        rest: whatever is none of these, such as a state-space model's decay rates and layers whose
            weight is used without calling them: ``free``, or ``frozen_after_first``.

    Raises:
        UsageError: an option is none of the above.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    bias: Literal["free", "augmented", "frozen"] = "augmented"
    norm: Literal["free", "frozen_after_first"] = "frozen_after_first"
    heads: Literal["auto", "always", "never"] = "auto"
    embeddings: Literal["free", "frozen_after_first"] = "frozen_after_first"
    tied: Literal["auto", "project", "frozen_after_first", "free"] = "auto"
    rest: Literal["free", "frozen_after_first"] = "free"

    def matches(self, name: str) -> bool:
        """Whether the layer called ``name`` is guarded."""
        wanted = not self.include or any(fnmatchcase(name, p) for p in self.include)
        return wanted and not any(fnmatchcase(name, p) for p in self.exclude)


Role = Literal["matrix", "vector", "embedding", "head"]
"""Of a parameter: a linear or convolutional layer's weight, attention's and recurrent layers' too;
whatever is neither that nor named below, above all biases, what normalises, and experts stacked in
one weight; a table of
embeddings, also where it is the output layer's weight; an output head's weight or bias."""

Of = Literal["loss", "logits"] | Callable[[Tensor, Batch], Tensor]
"""What a gradient is taken of: a name, or a function of outputs and batch that gives a scalar."""

Mode = Literal["eval", "train"]

PerSample = bool | Literal["squares"]
"""Whether a gradient is each sample's, and if so, whether all are kept or their squares' sum."""

Heads = Literal["current", "seen", "all"] | int
"""Output heads: of the task that is learned, of the tasks met so far, all there are, or one."""


class Position(NamedTuple):
    """Where training stands inside a task.

    Attributes:
        phase: of the task that goes on; None is the main one, and what comes before any.
        epoch: of the phase, from 0.
        step: optimizer steps taken in the phase: 0 at its first batch, and 1 in the ``after_step``
            behind that.
        steps: planned for the phase; fewer are taken where it is stopped.
        epochs: of the phase, at most.
    """

    phase: str | None
    epoch: int
    step: int
    steps: int
    epochs: int


class Snapshot(Protocol):
    """A network as it was: in evaluation mode, without gradients, with the heads seen by then."""

    def __call__(self, batch: Batch, head: int | None = None) -> Tensor:
        """As the learner's."""

    def features(self, batch: Batch, bare: bool = False) -> Tensor:
        """As the learner's."""

    def readout(self, features: Tensor, heads: Heads = "seen") -> Tensor:
        """As the learner's."""


class Learner(Protocol):
    """Model, loss and score, and the services through which strategies reach the network."""

    batch_size: int
    """Samples of one optimizer step."""

    @property
    def least_batch(self) -> int:
        """2 where a batch of one sample means something else than the sample in a larger one."""

    seed: int

    modality: str
    """Of the stream: ``image``, ``text``, ..."""

    def example(self) -> Batch:
        """A sample of the stream's first task, as the network takes it.

        Raises:
            UsageError: no stream is known, as in somebody else's loop.
        """

    @property
    def pretrained(self) -> bool:
        """Whether the network came with weights that know something already."""

    @property
    def progress(self) -> Position:
        """Where training stands; all zeros until it begins, and how it ended after it.

        In a federation, inside the client's own fit.

        Raises:
            UsageError: nobody tells, as in somebody else's loop that has not said how long it goes.
        """

    @property
    def network(self) -> nn.Module:
        """The module whose layers strategies see."""

    def __call__(self, batch: Batch, head: int | None = None) -> Tensor:
        """Logits for a batch, from the head that serves it or from ``head``."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Inside, the network is in evaluation mode; afterwards as it was, module by module."""

    def features(self, batch: Batch, bare: bool = False) -> Tensor:
        """What the output layer reads, in the mode that the network is in.

        (n, d) of classifiers, (n, L, d) of language models: a state for every token that
        ``learner(batch)`` has logits for (the decoder's, of encoder-decoders). With gradients
        where they are enabled.

        Args:
            batch: on any device.
            bare: as if PEFT's adapters were not there; they are afterwards, as they were.

        Raises:
            UsageError: which layer reads out is not known, as in somebody else's model; or an
                adapter is merged, with ``bare``.
        """

    def readout(self, features: Tensor, heads: Heads = "seen") -> Tensor:
        """Logits (n, classes) that heads make of :meth:`features`, side by side.

        With ``seen``, just what ``learner(batch)`` says, but for classes of other tasks, which that
        leaves out where the task id is known. A language model has one head, whatever is asked.

        Raises:
            UsageError: there is no such head; or as :meth:`features`.
        """

    def snapshot(self) -> "Snapshot":
        """A frozen copy of the network as it is now, which later training leaves alone.

        Heads seen then are those of all tasks that have begun, so in ``setup`` the new one's too.
        A checkpoint holds nothing of it: one that ``setup`` makes is made again on resume,
        where ``setup`` is replayed from the weights that the task began with (in a federation, in
        every round, from those that the client was sent); one that is made later is gone.

        Raises:
            UsageError: processes share the weights out.
        """

    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        """Mean loss over the batch."""

    def total_loss(self, out: Tensor, batch: Batch) -> Loss:
        """The loss as what may be added up over batches, in double precision."""

    def extras(self, strategy: object) -> nn.ModuleDict:
        """The modules that ``strategy`` has asked for; empty where it has none."""

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters that take part in the current task."""

    def hold(self, modules: Iterable[nn.Module]) -> None:
        """Until the next task: no gradients, no optimizer state, running statistics held."""

    def hold_others(self, kept: Iterable[nn.Parameter], norms: bool) -> None:
        """Until the next task, of what tasks share nothing learns but ``kept`` and, maybe, norms.

        Heads that belong to one task learn as they would.
        """

    def others(self, kept: Iterable[nn.Parameter], norms: bool) -> list[nn.Parameter]:
        """What :meth:`hold_others` holds."""

    def weights(self) -> dict[str, Tensor]:
        """Weights and buffers, by name.

        They are live: training and :meth:`load_weights` change them, so clone what is to last. Only
        where processes share weights out are they whole copies, and all processes must ask.
        """

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights and buffers, of just these names and shapes, into the network's own."""

    def roles(self) -> dict[str, Role]:
        """What each parameter is for, by name, every one once.

        In somebody else's network only the heads that it names are known as such.
        """

    def second_moments(self) -> dict[str, Tensor]:
        """The training optimizer's running estimate of squared gradients, by parameter name.

        The raw value, without bias correction (Adagrad's is a sum), live. It is there from the
        first step to the end of ``consolidate``; a parameter that was never stepped has none.

        Raises:
            UsageError: no optimizer trains now, or it keeps no such estimate.
        """

    def named_trainable(self) -> dict[str, nn.Parameter]:
        """The same, by name."""

    def blocks(self) -> list[nn.Module]:
        """The network's blocks, from the input upwards; heads are not among them."""

    def embeddings(self) -> list[nn.Module]:
        """Input embeddings: of tokens, of learned positions; none in a network without them."""

    @property
    def tied(self) -> bool:
        """Whether an embedding shares its weight with an output head."""

    def performance(self, batch: Batch) -> float:
        """Mean score over the batch at the current weights; no side effects."""

    def draw_labels(self, batch: Batch, generator: Generator) -> Batch:
        """The batch with labels drawn from the model's own predictions."""

    def predictions(self, out: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (m, classes) and labels (m,) of all terms of the loss; of text, labelled tokens.

        Raises:
            UsageError: the learner's loss is not made of such terms.
        """

    def own_answers(self, batch: Batch, temperature: float, generator: Generator) -> Batch:
        """A batch of prompts with the model's own answers as labels, as many tokens as fit.

        Args:
            batch: prompts; what it labels inside of them is labelled no more.
            temperature: of sampling; 0 takes the likeliest token.
            generator: of what is drawn.

        Raises:
            UsageError: the learner reads no prompts.
        """

    def layers(self, protect: Protect) -> "list[LinearMap]":
        """The linear maps that ``protect`` selects, in forward order of registration."""

    def tap(
        self,
        layers: "Sequence[LinearMap]",
        batches: Iterable[Batch],
        into: "Mapping[str, Accumulator] | None" = None,
        dropout: bool = False,
    ) -> "Mapping[str, Moments]":
        """Second moments of the layers' inputs over the batches, in evaluation mode.

        With ``into``, the inputs are added to those accumulators instead, by layer name.
        ``dropout`` leaves dropout on; of a layer right behind one, what enters the dropout counts.
        """

    def gradients(
        self,
        batch: Batch,
        of: Of = "loss",
        per_sample: PerSample = False,
        mode: Mode = "eval",
    ) -> dict[str, Tensor]:
        """Raw gradients of the trainable parameters at the current weights; no side effects.

        With ``mode="train"`` dropout drops, drawing from torch's generator as training does, and
        batch normalisation goes by the batch, whose statistics it does not take down.

        Args:
            batch: on any device.
            of: ``loss``, ``logits`` (the logit of each sample's own label), or a function of the
                outputs and the batch, which gives a scalar.
            per_sample: every gradient has the batch as its first dimension: of each sample's value
                by itself, in ``train`` of one pass of the whole batch; with ``squares``, the sum of
                their squares stands in place of them all. Otherwise it is that of the mean over the
                batch.
            mode: of the network.
        """

    def guard(self, protect: Protect, first_task: bool) -> None:
        """Apply ``protect``'s bias and normalisation policy to the current task."""

    def guarded(self, protect: Protect) -> frozenset[str]:
        """Names of the parameters that :meth:`layers` and :meth:`guard` keep.

        Raises:
            UsageError: no subspace of inputs can guard a layer that ``protect`` selects.
        """

    def train_heads(self, which: Literal["current", "seen", "all"]) -> None:
        """Which output heads take part in training, until the next task.

        With ``all``, those of tasks to come do too: in training mode, outputs then hold their
        classes.
        """

    def reset_weights(self) -> None:
        """Back to the weights of construction."""

    @property
    def projectable(self) -> Literal["input", "gradient", "step"]:
        """The cheapest place at which projecting keeps the *weight change* in the subspace."""

    def parameters(self, recurse: bool = True) -> Any:
        """All parameters, as of any module."""
