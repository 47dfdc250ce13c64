"""Image (and other fixed-size) classification in the three scenarios of continual learning."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cl_bench.contracts import Batch, Stream, UsageError, derive_seed
from cl_bench.learners.batch_norm import need_company
from cl_bench.learners.classes import Classes
from cl_bench.learners.module import BaseLearner
from cl_bench.optimizers import OptimizerFactory


class Classifier(Classes, BaseLearner):
    """A backbone and one linear head (``domain``) or one per task (``task``, ``class``).

    Outputs are logits over the stream's label space as far as it has been seen. With the task id
    known (``task``) classes of other tasks are masked out; without it (``class``) they compete, and
    the score with the task id known is measured beside the other.

    Args:
        stream: tells heads, input shape and scenario.
        model: features (n, ...) from inputs (n, *input_shape); its width is found by a dry run.
        optimizer: builds an optimizer from parameter groups.
        batch_size: samples of one optimizer step.
        seed: initialises each head independently of how many there are.
        pack: batches that one ``training_step`` learns.
        head_bias: whether heads have biases.

    Raises:
        UsageError: the model does not accept the stream's inputs.
    """

    def __init__(
        self,
        stream: Stream,
        model: nn.Module,
        optimizer: OptimizerFactory,
        batch_size: int,
        seed: int,
        pack: int = 1,
        head_bias: bool = False,
    ) -> None:
        if stream.modality == "text":
            raise UsageError(
                f"learner=classifier tells classes apart, stream {stream.name!r} asks for words: "
                "use learner=language with a language model such as model=t5_tiny"
            )
        super().__init__(stream, optimizer, batch_size, seed, pack)
        self.backbone = model
        width, self.need_company = _dry_run(model, stream)
        self.heads = nn.ModuleList()
        for i, classes in enumerate(stream.heads):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(seed, "head", i))
                self.heads.append(nn.Linear(width, classes, bias=head_bias))
        sizes = [(task.head, task.classes) for task in stream]
        offsets = sorted({(head, classes.start, classes.stop) for head, classes in sizes})
        owner = torch.zeros(max(stop for _, _, stop in offsets), dtype=torch.long)
        for head, start, stop in offsets:
            owner[start:stop] = head
        self.register_buffer("head_of_class", owner, persistent=False)
        self.remember_initial_state()

    def forward(self, batch: Batch, head: int | None = None) -> Tensor:
        """Logits (n, classes seen), or (n, classes of that head) for an explicit ``head``."""
        features, heads = self.backbone(batch["x"]).flatten(1), list(self.heads)
        if head is not None or len(heads) == 1:
            logits: Tensor = heads[head or 0](features)
            return logits
        seen = len(heads) if self.open_heads and self.training else max(1, self.seen_heads)
        logits = torch.cat([h(features) for h in heads[:seen]], dim=1)
        if self.scenario == "task":
            logits = self._of_heads(logits, batch["task"])
        return logits

    def _features(self, batch: Batch) -> Tensor:
        features: Tensor = self.backbone(batch["x"])
        return features.flatten(1)

    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(out, batch["y"])


def _dry_run(model: nn.Module, stream: Stream) -> tuple[int, list[str]]:
    """How many features the model gives, and which of its layers need company."""
    training = model.training
    model.eval()
    found: list[Tensor] = []
    try:
        x = torch.zeros(2, *stream.input_shape, dtype=stream.input_dtype)
        lonely = need_company(model, lambda: found.append(model(x)), 2)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"the model does not accept inputs of shape {stream.input_shape} that stream "
            f"{stream.name!r} gives ({error}); choose another with model=..."
        ) from error
    model.train(training)
    return int(found[0].flatten(1).shape[1]), [f"backbone.{name}".strip(".") for name in lonely]
