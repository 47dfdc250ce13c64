"""A stream that labels itself: the model of the task before labels every task but the first.

After "Model collapse demystified" (Dohmatob, Feng & Kempe), here for classes; what iterated
regression comes to in closed form is in :mod:`cl_bench.metrics.collapse`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cl_bench.contracts.options import Count, Seed, Share, Strength
from cl_bench.contracts.randomness import derive_seed, generator
from cl_bench.contracts.stream import Batch, Data, Stream
from cl_bench.data import MemoryData
from cl_bench.tasks.arguments import require
from cl_bench.tasks.digits import load_digits
from cl_bench.tasks.tensors import TensorTask


class Generation(TensorTask):
    """Inputs of its own, and labels that the model of the generation before gives them.

    Args:
        index: position in the stream; the first keeps its labels.
        x: inputs.
        y: what they truly show.
        stream: whose generations before it may be learned along.
        test: inputs and true labels.
    """

    def __init__(
        self,
        index: int,
        x: Tensor,
        y: Tensor,
        stream: "SelfConsuming",
        test: tuple[Tensor, Tensor],
        **facts: Any,
    ) -> None:
        super().__init__(
            index, (x, y), test=test, name=f"generation_{index + 1}", task_id=False, **facts
        )
        self.x, self.truth, self.y = x, y, y
        self.stream = stream

    @property
    def train(self) -> Data:
        """The generation's samples, and those that are kept of the ones before."""
        parts = [(self.x, self.y)]
        for old in self.stream.generations[: self.index]:
            kept = round(self.stream.keep * len(old.x))
            parts.append((old.x[:kept], old.y[:kept]))
        x, y = (torch.cat(values) for values in zip(*parts, strict=True))
        return MemoryData({"x": x, "y": y})

    def prepare(self, answer: Callable[[Batch], Tensor]) -> Mapping[str, float] | None:
        """Draw labels; tells how many are right, their entropy in nats, classes still there."""
        if self.index == 0:
            return None
        logits = answer({"x": self.x, "y": self.truth}).cpu().double()
        heat, seed = self.stream.temperature, self.stream.label_seed
        if heat:
            rng = generator(derive_seed(seed, "labels", self.index), "draw")
            drawn = torch.multinomial((logits / heat).softmax(1), 1, generator=rng)
            self.y = drawn.squeeze(1)
        else:
            self.y = logits.argmax(1)
        share = torch.bincount(self.y, minlength=len(self.classes)).double() / len(self.y)
        return {
            "right": float((self.y == self.truth).double().mean()),
            "entropy": float(torch.special.entr(share).sum()),
            "classes": float((share > 0).double().mean()),
        }


class SelfConsuming(Stream):
    """scikit-learn's digits; each task has other images, and labels of the model before it.

    Scores are on the same test images with their true labels: R[k, k] is what generation k still
    knows.

    Args:
        num_tasks: generations; the images are divided evenly.
        keep: share of every generation's samples that later ones learn along, with its labels.
        temperature: of the model's distribution that labels are drawn from; 0 takes the likeliest.
        label_seed: of the draw.

    Raises:
        UsageError: an argument is out of range.
    """

    def __init__(
        self,
        num_tasks: Count = 8,
        keep: Share = 0.0,
        temperature: Strength = 1.0,
        label_seed: Seed = 0,
    ) -> None:
        source = load_digits()
        size = len(source.train) // num_tasks
        require(size >= 10, "num_tasks", num_tasks, f"at most {len(source.train) // 10}")
        self.keep, self.temperature, self.label_seed = keep, temperature, label_seed
        (mean,), (std,) = source.moments.mean, source.moments.std
        rows = torch.arange(len(source.train))
        x, tested = (
            (source_part / source.maximum - mean) / std
            for source_part in (source.train[rows], source.test[torch.arange(len(source.test))])
        )
        test = (tested, source.test_labels)
        order = torch.randperm(len(x), generator=generator(0, "generations"))
        self.generations = [
            Generation(
                t, x[part], source.train_labels[part], self, test, classes=range(10),
                origin=source.origin,
            )
            for t, part in enumerate(torch.split(order[: size * num_tasks], size))
        ]  # fmt: skip
        fingerprint = f"{source.fingerprint} {num_tasks} {keep} {temperature} {label_seed}"
        super().__init__("self_consuming", self.generations, "domain", source.shape, fingerprint)

    def state_dict(self) -> dict[str, Any]:
        """Labels that were given so far."""
        return {"labels": [task.y for task in self.generations]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        for task, labels in zip(self.generations, state["labels"], strict=True):
            task.y = labels
