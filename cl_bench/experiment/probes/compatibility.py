"""Whether representations stay comparable: old galleries against new queries, task after task."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from cl_bench.contracts import State, Stream, Task, UsageError
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Range
from cl_bench.experiment.observer import Observer
from cl_bench.experiment.probes.settings import ENABLED, Probe, Scene
from cl_bench.learners import BaseLearner
from cl_bench.learners.observed import embedded
from cl_bench.metrics.retrieval import cmc1, compatibility, mean_average_precision, ranked
from cl_bench.tracking import Record


@checked("probe.compatibility.")
@dataclass(frozen=True)
class CompatibilitySettings(Probe):
    """Retrieval among the same samples, embedded by the models after different tasks.

    Attributes:
        enabled: measure it.
        samples: test samples of every task, of the whole stream, that are embedded after each.
    """

    enabled: bool = False
    samples: Annotated[int, Range(least=2), ENABLED] = 100

    def observer(self, scene: Scene) -> Observer:
        """What watches.

        Raises:
            UsageError: the stream asks for words.
        """
        if scene.stream.modality == "text":
            raise UsageError(
                f"probe.compatibility.enabled=true: stream {scene.stream.name!r} asks for words, "
                "and retrieval compares classes; leave it off"
            )
        return Compatibility(self, scene.stream, scene.record)


class Compatibility(Observer):
    """Keeps embeddings, not models: (samples, d) after every task.

    After task i the record has, as the probe ``compatibility``, ``cmc1`` and ``map``, each with
    the row M[i, 0], ..., M[i, i], and what :func:`cl_bench.metrics.retrieval.compatibility` makes
    of all rows so far.

    Args:
        settings: of the measurement.
        stream: whose test data are embedded.
        record: keeps what was found.
    """

    def __init__(self, settings: CompatibilitySettings, stream: Stream, record: Record) -> None:
        self.settings, self.stream, self.record = settings, stream, record
        self.galleries: list[Tensor] = []
        self.scores: dict[str, list[list[float]]] = {"cmc1": [], "map": []}

    def after_task(self, learner: BaseLearner, task: Task) -> Mapping[str, Mapping[str, float]]:
        """Embed, and compare with all galleries so far, the own one included."""
        parts, labels = [], []
        for one in self.stream:
            count = min(self.settings.samples, len(one.scored))
            batch = one.scored[torch.linspace(0, len(one.scored) - 1, count).long()]
            parts.append(embedded(learner, batch, one))
            labels.append(batch["y"])
        queries, y = torch.cat(parts), torch.cat(labels)
        self.galleries.append(queries)
        hits = [ranked(queries, gallery, y) for gallery in self.galleries]
        self.scores["cmc1"].append([cmc1(h) for h in hits])
        self.scores["map"].append([mean_average_precision(h) for h in hits])
        values = {
            name: {"row": rows[-1], **compatibility(rows)} for name, rows in self.scores.items()
        }
        self.record.probe("compatibility", task=task.index, values=values)
        return {}

    def state_dict(self) -> State:
        """Galleries and scores."""
        scores = {name: [list(row) for row in rows] for name, rows in self.scores.items()}
        return {"galleries": list(self.galleries), "scores": scores}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.galleries = list(state["galleries"])
        self.scores = {name: [list(r) for r in rows] for name, rows in state["scores"].items()}
