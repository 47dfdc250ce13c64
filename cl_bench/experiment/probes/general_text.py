"""What a task costs in general: loss on held-out text of no task, before and after it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from cl_bench.contracts import Batch, State, Stream, Task, UsageError
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, Range
from cl_bench.experiment.observer import Observer
from cl_bench.experiment.probes.held_out import (
    Objective,
    continuation,
    read_texts,
    span_corruption,
    windows,
)
from cl_bench.experiment.probes.settings import ENABLED, Probe, Scene
from cl_bench.learners import BaseLearner
from cl_bench.learners.observed import loss_on
from cl_bench.tracking import Record


@checked("probe.general_text.")
@dataclass(frozen=True)
class GeneralTextSettings(Probe):
    """Loss of a language model on text that no task teaches, before and after every task.

    Attributes:
        enabled: measure it.
        path: a file that ends in ``.txt``, ``.jsonl`` or ``.jsonl.gz``.
        dataset: a data set on the Hugging Face hub. With neither, a dozen paragraphs that come with
            the package: enough to see damage, no benchmark.
        subset: of the data set.
        split: of the data set; one that nothing was trained on.
        field: member of a line, or column, that holds the text.
        windows: most pieces of text.
        length: tokens of each.
        objective: ``continuation`` (a causal model is given one token of a window, an
            encoder-decoder half of them), ``span_corruption`` (T5's pre-training), or ``auto``: the
            latter for an encoder-decoder whose tokenizer has the tokens that it takes.
    """

    enabled: bool = False
    path: Annotated[str | None, ENABLED] = None
    dataset: Annotated[str | None, ENABLED] = None
    subset: Annotated[str | None, ENABLED] = None
    split: Annotated[str, ENABLED] = "test"
    field: Annotated[str, ENABLED] = "text"
    windows: Annotated[Count, ENABLED] = 64
    length: Annotated[int, Range(least=8), ENABLED] = 128
    objective: Annotated[Literal["auto", "continuation", "span_corruption"], ENABLED] = "auto"

    def __post_init__(self) -> None:
        if self.path is not None and self.dataset is not None:
            raise UsageError(
                f"probe.general_text.path={self.path} and probe.general_text.dataset="
                f"{self.dataset}: give one of them"
            )

    @property
    def source(self) -> str:
        """Where the text comes from, for the record."""
        if self.dataset is not None:
            return "/".join(x for x in (self.dataset, self.subset, self.split) if x)
        return self.path or "cl_bench"

    def observer(self, scene: Scene) -> Observer:
        """What watches."""
        return GeneralText(self, scene.eval_batch_size, scene.stream, scene.learner, scene.record)


class GeneralText(Observer):
    """Mean loss (nats) of a token of general text.

    Quantities, after a task: ``before`` and ``after`` it, ``change`` between them, ``since_start``
    the change since the first task began.

    Args:
        settings: which text, and how much of it.
        batch_size: windows of a batch.
        stream: tells the tokenizer.
        learner: whose loss it is.
        record: keeps what was found.

    Raises:
        UsageError: the model cannot read the text, or there is too little of it.
    """

    def __init__(
        self,
        settings: GeneralTextSettings,
        batch_size: int,
        stream: Stream,
        learner: BaseLearner,
        record: Record,
    ) -> None:
        codec: Any = getattr(stream, "codec", None)
        if codec is None:
            raise UsageError(
                f"probe.general_text.enabled=true: stream {stream.name!r} has no tokenizer that "
                "reads any text; use a stream of prompts such as +stream=t5_cl_fewshot, or leave "
                "it off"
            )
        config: Any = learner.config
        pairs = bool(config.is_encoder_decoder)
        positions = None if pairs else getattr(config, "max_position_embeddings", None)
        if positions is not None and settings.length > positions:
            raise UsageError(
                f"probe.general_text.length={settings.length}: the model has {positions} positions"
            )
        sentinels = _sentinels(codec.pieces)
        self.objective = _objective(settings, pairs, sentinels)
        texts = [codec.encode(text) for text in read_texts(settings)]
        tokens = windows(texts, codec.end, settings.length, settings.windows)
        if len(tokens) == 0:
            raise UsageError(
                f"probe.general_text: {settings.source} has {sum(map(len, texts))} tokens, fewer "
                f"than one window of probe.general_text.length={settings.length}"
            )
        if self.objective == "span_corruption":
            self.text = span_corruption(tokens, sentinels, codec.end)
        else:
            self.text = continuation(tokens, settings.length // 2 if pairs else 1)
        self.settings = settings
        self.batch_size = batch_size
        self.record = record
        self.start: float | None = None
        self.before = float("nan")

    def before_task(self, learner: BaseLearner, task: Task) -> None:
        """Measure."""
        self.before = self._measure(learner)
        if self.start is None:
            self.start = self.before

    def after_task(self, learner: BaseLearner, task: Task) -> Mapping[str, Mapping[str, float]]:
        """Measure again."""
        began = time.perf_counter()
        after = self._measure(learner)
        assert self.start is not None
        self.record.probe(
            "general_text",
            task=task.index,
            values={
                "before": self.before,
                "after": after,
                "change": after - self.before,
                "since_start": after - self.start,
            },
            objective=self.objective,
            source=self.settings.source,
            windows=len(self.text["labels"]),
            tokens=self.text["labels"].numel(),
            seconds=time.perf_counter() - began,
        )
        return {}

    def _measure(self, learner: BaseLearner) -> float:
        """Every window has as many tokens to predict as the others."""
        total, n = 0.0, len(self.text["labels"])
        for first in range(0, n, self.batch_size):
            piece: Batch = {k: v[first : first + self.batch_size] for k, v in self.text.items()}
            total += loss_on(learner, piece, None) * len(piece["labels"])
        return total / n

    def state_dict(self) -> State:
        """Where the run, and the task, began."""
        return {"start": self.start, "before": self.before}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.start, self.before = state["start"], state["before"]


def _sentinels(pieces: Any) -> list[int]:
    """Tokens that T5's pre-training puts into gaps, in its order."""
    places = {piece: i for i, piece in enumerate(pieces)}
    found = (places.get(f"<extra_id_{i}>") for i in range(len(places)))
    listed = []
    for token in found:
        if token is None:
            break
        listed.append(token)
    return listed


def _objective(settings: GeneralTextSettings, pairs: bool, sentinels: list[int]) -> Objective:
    asked = settings.objective
    gaps = len(sentinels) > settings.length // 20  # more than windows of that length take
    if asked == "auto":
        return "span_corruption" if pairs and gaps else "continuation"
    if asked == "span_corruption" and not (pairs and gaps):
        raise UsageError(
            "probe.general_text.objective=span_corruption: needs an encoder-decoder, and a "
            f"tokenizer with <extra_id_0>, <extra_id_1>, ... (this one has {len(sentinels)}); use "
            "probe.general_text.objective=continuation"
        )
    return asked
