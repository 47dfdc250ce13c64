"""The federation over Flower: needs the extra; `make test-flower` installs it and runs these."""

import contextlib
import functools
import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

pytest.importorskip("flwr", reason="pip install 'cl_bench[flower]'")

from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from ports import is_loopback, listening

from cl_bench.cli import flower, flower_server
from cl_bench.cli.folders import conf_directory
from cl_bench.cli.run import run_config
from cl_bench.contracts import UsageError
from cl_bench.federation import flower as adapter
from runs import differences, final_weights

SMALL = (
    "+experiment=fot_digits",
    "stream.num_tasks=2",
    "federation.clients=5",
    "federation.per_round=3",
    "federation.rounds=2",
    "logger.mode=disabled",
)
CHOICES = {"strategy": "fot", "stream": "permuted_digits"}
IGNORE = ("client_seconds", "federation")


def composed(*overrides):
    with hydra.initialize_config_dir(str(conf_directory()), version_base="1.3"):
        return hydra.compose("config", [*SMALL, *overrides])


@pytest.fixture(autouse=True)
def inside_a_task(monkeypatch):
    """Flower lets nobody make messages outside of a running app."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class OneProcess:
    """A grid of two nodes without any network."""

    def __init__(self):
        self.nodes = {7: adapter.Node(flower._assembled), 3: adapter.Node(flower._assembled)}
        self.asked = []

    def get_node_ids(self):
        return list(self.nodes)

    def send_and_receive(self, messages):
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            asked = message.content["asked"]
            self.asked.append((node, asked["client"], message.metadata.message_type))
            replies.append(self.nodes[node].answer(message))
        return replies[::-1]  # they come in any order


def run(directory, *overrides, grid=None):
    cfg = composed(f"run_dir={directory}", *overrides)
    config = adapter.as_json(OmegaConf.to_container(cfg, resolve=True), CHOICES)
    given = {}
    if grid is not None:
        given["site"] = functools.partial(adapter.FlowerSite, grid, config, nodes=len(grid.nodes))
    with redirect_stdout(io.StringIO()):
        return run_config(cfg, "", CHOICES, given=given)


def same(a, b):
    assert differences(a, b, IGNORE) == []
    one, other = final_weights(a), final_weights(b)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if "seconds" not in name:
            assert value == other[name], name


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("strategy=fot_official", "federation.statistics=sampled"),
        ("strategy=ewc", "federation.partition=shards", "federation.weighting=samples"),
        ("strategy=fedprox", "federation.participation=0.5"),
    ],
)
def test_over_messages_the_same_is_learned(tmp_path, options):
    torch.set_num_threads(1)
    grid = OneProcess()
    run(tmp_path / "flower", *options, grid=grid)
    run(tmp_path / "inprocess", *options)
    same(tmp_path / "inprocess", tmp_path / "flower")
    assert {node for node, _, _ in grid.asked} == {3, 7}
    assert all((client % 2 == 0) == (node == 3) for node, client, _ in grid.asked)
    assert {kind for _, _, kind in grid.asked} <= {"train", "query.statistics"}


def test_what_goes_wrong_on_a_node_ends_the_run_with_its_words(tmp_path):
    with pytest.raises(UsageError, match=r"on client .* lower the learning rate"):
        run(tmp_path / "run", "optimizer.lr=1e18", grid=OneProcess())


def test_private_memories_stay_out_of_flower():
    with pytest.raises(UsageError, match=r"'er'.*federation.engine=inprocess"):
        run_config(composed("strategy=er", "federation.engine=flower"), "", {"strategy": "er"})


def test_simulation_learns_the_same(tmp_path):
    torch.set_num_threads(1)
    run(tmp_path / "flower", "federation.engine=flower")
    run(tmp_path / "inprocess")
    same(tmp_path / "inprocess", tmp_path / "flower")
    matrix = np.loadtxt(tmp_path / "flower" / "accuracy_matrix.csv", delimiter=",", skiprows=1)
    assert matrix[1, 1] > 0.5


def test_the_server_app_runs_what_its_configuration_says(tmp_path):
    grid = OneProcess()
    cfg = composed(f"run_dir={tmp_path / 'run'}")
    config = adapter.as_json(OmegaConf.to_container(cfg, resolve=True), CHOICES)
    given = {"cl_bench": config, "command": "python -m cl_bench", "resume": False, "nodes": 2}
    context = Context(1, 0, {}, RecordDict(), given)
    with redirect_stdout(io.StringIO()):
        flower_server.serve(grid, context)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "completed"


def test_the_simulation_opens_no_port_to_others():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        ours = [os.getpid(), *_children(os.getpid())]
        found = [address for process in ours for address in listening(process)]
        assert found, "Ray listens somewhere, or this test sees nothing"
        assert all(map(is_loopback, found)), found
        assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    finally:
        ray.shutdown()


def _children(process):
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if path.read_text().rpartition(")")[2].split()[1] == str(process):
                child = int(path.parent.name)
                yield from (child, *_children(child))
