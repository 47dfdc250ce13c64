"""The federation's clients as a Flower app, and how a run gets to Flower.

``federation.engine=flower`` runs clients and server in Flower's simulation; with
``federation.superlink`` they are handed to ``flwr run``, which starts
:mod:`~cl_bench.cli.flower_server` on a SuperLink and ``client_app`` on its SuperNodes. The run's
configuration goes along as one string.
"""

import json
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray runs what it is sent. In the simulation it needs no other machine: told that this is no place
# for a cluster, it listens on loopback alone (on Linux too, whatever the name says), and it answers
# only processes that know the secret.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from omegaconf import OmegaConf

from cl_bench.cli.build import build, build_model, build_stream
from cl_bench.cli.optimizers import build_optimizer
from cl_bench.cli.together import read_result
from cl_bench.contracts import FederatedStrategy, Strategy, Stream, UsageError, derive_seed
from cl_bench.experiment import Result, seed_training
from cl_bench.experiment.reopen import Resume
from cl_bench.federation import Federation
from cl_bench.federation.flower import FlowerSite, Node
from cl_bench.federation.site import Site
from cl_bench.learners import BaseLearner
from cl_bench.tracking.reading import is_finished

APP = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "cl-bench-federation"
version = "1.0.0"
description = "A run of cl_bench"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "cl-bench"

[tool.flwr.app.components]
serverapp = "cl_bench_federation:server_app"
clientapp = "cl_bench_federation:client_app"

[tool.flwr.app.config]
"""

MODULE = """\
from cl_bench.cli.flower import client_app
from cl_bench.cli.flower_server import server_app
"""

client_app = ClientApp()
_here = threading.local()


def _node() -> Node:
    """One a thread: a node's model instance is not for two at a time."""
    if not hasattr(_here, "node"):
        torch.set_num_threads(1)
        _here.node = Node(_assembled)
    node: Node = _here.node
    return node


def _assembled(config: str) -> tuple[Stream, FederatedStrategy, BaseLearner, Federation]:
    """A node's side of a configuration that the server has checked."""
    cfg = OmegaConf.create(json.loads(config)["config"])
    seed = cfg.seed
    strategy = build(cfg.strategy)
    stream = build_stream(cfg.stream, strategy)
    seed_training(derive_seed(seed, "model"))
    learner = build(
        cfg.learner,
        stream=stream,
        model=build_model(cfg.model, stream),
        optimizer=build_optimizer(cfg.optimizer).factory,
        batch_size=cfg.batch_size,
        seed=seed,
        pack=cfg.pack,
    )
    return stream, strategy, learner, build(cfg.federation)


def _fit(message: Message, context: Context) -> Message:
    return _node().answer(message)


def _statistics(message: Message, context: Context) -> Message:
    return _node().answer(message)


client_app.train()(_fit)
client_app.query("statistics")(_statistics)


def simulate(run: Callable[[Callable[..., Site]], Result], config: str, nodes: int) -> Result:
    """Run an experiment in Flower's simulation.

    Args:
        run: the experiment, given what makes its site from a strategy.
        config: the configuration in JSON, for the nodes.
        nodes: virtual ones.
    """
    outcome: dict[str, Any] = {}
    app = ServerApp()

    def main(grid: Grid, context: Context) -> None:
        try:
            outcome["result"] = run(lambda strategy: FlowerSite(grid, config, strategy, nodes))
        except BaseException as error:
            outcome["error"] = error

    app.main()(main)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    run_simulation(
        app,
        client_app,
        num_supernodes=nodes,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"log_to_driver": False, "include_dashboard": False},
        },
    )
    if "error" in outcome:
        raise outcome["error"]
    result: Result = outcome["result"]
    return result


def submit(
    config: str,
    command: str,
    resume: Resume,
    superlink: str,
    nodes: int,
    run_dir: Path,
    learner: BaseLearner,
    strategy: Strategy,
) -> Result:
    """Have an experiment run on a SuperLink, wait for its end, and read what it left.

    Args:
        config: the configuration in JSON.
        command: the command line.
        resume: go on with the run in ``run_dir``.
        superlink: the connection's name in Flower's ``config.toml``.
        nodes: SuperNodes to wait for.
        run_dir: where the SuperLink's process writes.
        learner: takes the final weights from the run's last checkpoint, if it wrote any.
        strategy: takes its memory from there.

    Raises:
        UsageError: the run did not end well.
    """
    values = {"cl_bench": config, "command": command, "resume": resume, "nodes": nodes}
    # A JSON string, number or truth value is one of TOML too.
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    with tempfile.TemporaryDirectory() as folder:
        app = Path(folder)
        (app / "pyproject.toml").write_text(APP + "\n".join(lines) + "\n")
        (app / "cl_bench_federation.py").write_text(MODULE)
        flwr = Path(sys.executable).with_name("flwr")
        done = subprocess.run([str(flwr), "run", str(app), superlink, "--stream"], check=False)
    if done.returncode != 0 or not is_finished(run_dir):
        raise UsageError(
            f"the run on federation.superlink={superlink} did not end well: see above, and the "
            f"SuperLink's log; what was recorded is in {run_dir} on its machine"
        )
    return read_result(run_dir, learner, strategy)
