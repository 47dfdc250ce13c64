"""Clients behind Flower's grid: the same functions, carried by its messages.

Client ``k`` is served by node ``k`` modulo the number of nodes, in the order of their ids. A
message says which client, when, and in which configuration; all randomness follows from that, so it
does not matter which process answers.
"""

import io
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from cl_bench.contracts import Data, FederatedStrategy, State, Stream, Task, UsageError
from cl_bench.federation.client import Turn
from cl_bench.federation.partition import Partition, labels_of, partition
from cl_bench.federation.settings import Federation
from cl_bench.federation.site import InProcess, Report
from cl_bench.federation.upload import Upload
from cl_bench.learners import BaseLearner
from cl_bench.learners.work import Work

FIT, STATISTICS = "train", "query.statistics"

PATIENCE_SECONDS = 300.0
"""How long nodes may take to appear."""


class FlowerSite:
    """Sends every turn to a node and hands the replies on in the order of the turns.

    Args:
        grid: of the ServerApp.
        config: the resolved configuration, as JSON: what the nodes build their side from.
        strategy: the server's; what it shares is sent along.
        nodes: how many to wait for.
    """

    def __init__(self, grid: Grid, config: str, strategy: FederatedStrategy, nodes: int) -> None:
        self.grid = grid
        self.config = config
        self.strategy = strategy
        self._nodes = _wait_for(grid, nodes)
        self._work: dict[str, int] = {}

    def begin(self, task: Task, data: Data, partition: Partition) -> None:
        """Nodes find out from their messages."""

    def fit(
        self, turns: Sequence[Turn], weights: Mapping[str, Tensor], collect: bool
    ) -> Iterator[Report]:
        """Each client's report, in the order of ``turns``."""
        memory = self.strategy.share("collect" if collect else "fit")
        for turn, reply in self._ask(FIT, turns, weights, memory, collect):
            fit = _upload(reply, "fit")
            yield Report(turn.client, fit, _upload(reply, "statistics") if collect else None)

    def statistics(
        self, turns: Sequence[Turn], weights: Mapping[str, Tensor]
    ) -> Iterator[tuple[int, Upload]]:
        """Each client's statistics in the global model, in the order of ``turns``."""
        memory = self.strategy.share("collect")
        for turn, reply in self._ask(STATISTICS, turns, weights, memory, True):
            yield turn.client, _upload(reply, "statistics")

    def _ask(
        self,
        kind: str,
        turns: Sequence[Turn],
        weights: Mapping[str, Tensor],
        memory: State,
        collect: bool,
    ) -> Iterator[tuple[Turn, RecordDict]]:
        messages = []
        for turn in turns:
            asked = {**vars(turn), "collect": collect, "config": self.config}
            content = RecordDict(
                {
                    "weights": ArrayRecord(OrderedDict(weights)),
                    "asked": ConfigRecord({**asked, "memory": _packed(memory)}),
                }
            )
            node = self._nodes[turn.client % len(self._nodes)]
            messages.append(
                Message(content, dst_node_id=node, message_type=kind, group_id=str(turn.round))
            )
        found: dict[int, RecordDict] = {}
        for reply in self.grid.send_and_receive(messages):
            if reply.has_error():
                raise UsageError(
                    f"a node failed ({reply.error.reason}): its own log says why; results so far "
                    "are kept"
                )
            said: Any = reply.content["said"]
            if said["error"]:
                raise UsageError(str(said["error"]))
            found[int(said["client"])] = reply.content
            for name in Work().counts():
                self._work[name] = self._work.get(name, 0) + int(said[name])
        for turn in turns:
            yield turn, found[turn.client]

    def take_work(self) -> Mapping[str, int]:
        """Passes on the nodes since the last call."""
        work, self._work = self._work, {}
        return work

    def state_dict(self) -> State:
        """Nodes remember nothing that a run would need."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""


class Node:
    """What answers messages on a node.

    Args:
        build: makes stream, strategy, learner and federation from a configuration in JSON.
    """

    def __init__(
        self, build: Callable[[str], tuple[Stream, FederatedStrategy, BaseLearner, Federation]]
    ) -> None:
        self._build = build
        self._config = ""
        self._task = -1

    def answer(self, message: Message) -> Message:
        """Fit, or collect statistics."""
        asked: Any = message.content["asked"]
        found: dict[str, Any] = {}
        said: dict[str, Any] = {"client": int(asked["client"]), "error": ""}
        try:
            self._meet(str(asked["config"]), int(asked["task"]), int(asked["seed"]))
            self._strategy.load_state_dict(_unpacked(asked["memory"]))
            before = self._learner.work.counts()
            turn = Turn(*(int(asked[k]) for k in ("seed", "task", "round", "client")))
            weights = dict(message.content["weights"].to_torch_state_dict())
            if message.metadata.message_type == FIT:
                (report,) = self._site.fit([turn], weights, bool(asked["collect"]))
                uploads = {"fit": report.fit, "statistics": report.statistics}
            else:
                ((_, collected),) = self._site.statistics([turn], weights)
                uploads = {"statistics": collected}
            for name, upload in uploads.items():
                if upload is not None:
                    found[name] = ArrayRecord(OrderedDict(upload.sums))
                    said[f"{name}/steps"] = upload.steps
                    said[f"{name}/seconds"] = upload.seconds
            said |= {k: n - before[k] for k, n in self._learner.work.counts().items()}
        except UsageError as error:
            said["error"] = str(error)
        return Message(RecordDict({**found, "said": ConfigRecord(said)}), reply_to=message)

    def _meet(self, config: str, task: int, seed: int) -> None:
        if config != self._config:
            self._stream, self._strategy, self._learner, self._federation = self._build(config)
            self._site = InProcess(self._learner, self._strategy, self._federation)
            self._config, self._task = config, -1
        if task != self._task:
            t = self._stream[task]
            split = partition(t, labels_of(t.train), self._federation, seed)
            self._site.begin(t, t.train, split)
            # What earlier tasks have made of the learner, such as how many heads it knows.
            self._learner.seen_heads = max(
                [self._learner.seen_heads, *(s.head + 1 for s in self._stream[: task + 1])]
            )
            self._task = task


def _wait_for(grid: Grid, nodes: int) -> list[int]:
    begun = time.monotonic()
    while len(known := sorted(grid.get_node_ids())) < nodes:
        if time.monotonic() - begun > PATIENCE_SECONDS:
            raise UsageError(
                f"federation.nodes={nodes}, but {len(known)} nodes have come within "
                f"{PATIENCE_SECONDS:.0f} s: start the others, or ask for fewer"
            )
        time.sleep(0.2)
    return known


def _upload(reply: RecordDict, name: str) -> Upload:
    said: Any = reply["said"]
    sums: Any = reply[name]
    return Upload(
        dict(sums.to_torch_state_dict()),
        int(said[f"{name}/steps"]),
        float(said[f"{name}/seconds"]),
    )


def _packed(state: State) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _unpacked(content: bytes) -> State:
    state: State = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return state


def as_json(config: Mapping[str, Any], choices: Mapping[str, Any]) -> str:
    """The configuration that nodes are sent."""
    return json.dumps({"config": config, "choices": dict(choices)}, sort_keys=True, default=str)
