"""What a federated run has seen so far: splits, scores of clients, traffic."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cl_bench.contracts import State
from cl_bench.federation.fairness import client_forgetting, client_scores, spread


class Traffic:
    """Bytes of all clients together, and seconds that they computed."""

    def __init__(
        self,
        model_down: int = 0,
        model_up: int = 0,
        statistics_up: int = 0,
        memory_down: int = 0,
        client_seconds: float = 0.0,
    ) -> None:
        self.model_down = model_down
        self.model_up = model_up
        self.statistics_up = statistics_up
        self.memory_down = memory_down
        self.client_seconds = client_seconds


class History:
    """What the run has seen so far: splits, scores of clients, traffic.

    Attributes:
        counts: training samples (K, C) by client and class, by task.
        learned: scores of clients (K,) right after each task was learned.
        total: traffic of all tasks.
        forgetting: of clients, after the newest task: mean, lowest, highest.
    """

    def __init__(self) -> None:
        self.counts: dict[int, Tensor] = {}
        self.learned: dict[int, Tensor] = {}
        self.total = Traffic()
        self.forgetting: dict[str, float] = {}

    def scored(self, t: int, by_class: Mapping[int, Tensor]) -> dict[str, Any]:
        """Take in the scores of all tasks before ``t``, by class; what they mean for each client.

        Args:
            t: tasks learned, at least 1.
            by_class: score of every class (C,), by task.
        """
        now = {
            i: client_scores(counts, by_class[i])
            for i, counts in self.counts.items()
            if i < t and i in by_class
        }
        newest = self.learned[t - 1] = now[t - 1]
        lost = client_forgetting(self.learned, now, t - 1)
        self.forgetting = spread(lost)
        return {
            "forgetting": lost.tolist(),
            "newest": newest.tolist(),
            "summary": {
                **{f"forgetting_{k}": v for k, v in self.forgetting.items()},
                **{f"newest_{k}": v for k, v in spread(newest).items()},
            },
        }

    def summary(self) -> dict[str, Any]:
        """Traffic of the whole run, and what clients forgot."""
        forgetting = {f"client_forgetting_{k}": v for k, v in self.forgetting.items()}
        return {"federation": dict(vars(self.total)), **forgetting}

    def remarks(self) -> list[str]:
        """The same for people."""
        t, lost = self.total, self.forgetting
        up, down = t.model_up + t.statistics_up, t.model_down + t.memory_down
        lines = [
            f"traffic of all clients: {size(up)} up ({size(t.statistics_up)} statistics), "
            f"{size(down)} down ({size(t.memory_down)} memory); {t.client_seconds:.1f} s computed"
        ]
        if lost and lost["mean"] == lost["mean"]:
            lines.append(
                f"forgetting by client, points: mean {100 * lost['mean']:.1f}, "
                f"worst {100 * lost['highest']:.1f}, least {100 * lost['lowest']:.1f}"
            )
        return lines

    def add(self, traffic: Traffic) -> None:
        """That of one more task."""
        for key, value in vars(traffic).items():
            setattr(self.total, key, getattr(self.total, key) + value)

    def state_dict(self) -> State:
        """For a checkpoint."""
        return {
            "counts": dict(self.counts),
            "learned": dict(self.learned),
            "total": dict(vars(self.total)),
            "forgetting": dict(self.forgetting),
        }

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.counts, self.learned = dict(state["counts"]), dict(state["learned"])
        self.total = Traffic(**state["total"])
        self.forgetting = dict(state["forgetting"])


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"
