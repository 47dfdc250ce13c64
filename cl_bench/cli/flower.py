"""The federation as Flower apps, configured whole from our configuration.

``federation.engine=flower`` runs both in Flower's simulation. As processes of their own:
``server_app`` and ``client_app`` are what ``flwr run`` starts on a SuperLink and its SuperNodes;
the run's configuration comes as one string.
"""

import json
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from omegaconf import OmegaConf

from cl_bench.cli.build import assemble, run_config
from cl_bench.experiment import Result
from cl_bench.federation.flower import FIT, STATISTICS, FlowerSite, Node, as_json
from cl_bench.federation.site import Site

client_app = ClientApp()
_here = threading.local()


def _node() -> Node:
    """One a thread: a node's model instance is not for two at a time."""
    if not hasattr(_here, "node"):
        torch.set_num_threads(1)
        _here.node = Node(_assembled)
    node: Node = _here.node
    return node


def _assembled(config: str) -> Any:
    given = json.loads(config)
    parts = assemble(OmegaConf.create(given["config"]), given["choices"])
    return parts.stream, parts.strategy, parts.learner, parts.federation


@client_app.train()
def _fit(message: Message, context: Context) -> Message:
    return _node().answer(message)


@client_app.query("statistics")
def _statistics(message: Message, context: Context) -> Message:
    return _node().answer(message)


server_app = ServerApp()


@server_app.main()
def _serve(grid: Grid, context: Context) -> None:
    """The whole experiment, on a SuperLink."""
    given = json.loads(str(context.run_config["cl_bench"]))
    cfg = OmegaConf.create(given["config"])
    nodes = int(context.run_config["nodes"])
    run_config(
        cfg,
        str(context.run_config["command"]),
        given["choices"],
        site=lambda strategy: FlowerSite(
            grid, as_json(given["config"], given["choices"]), strategy, nodes
        ),
    )


def simulate(run: Callable[[Callable[..., Site]], Result], config: str, nodes: int) -> Result:
    """Run an experiment in Flower's simulation.

    Args:
        run: the experiment, given what makes its site from a strategy.
        config: the configuration in JSON, for the nodes.
        nodes: virtual ones.
    """
    outcome: dict[str, Any] = {}
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            outcome["result"] = run(lambda strategy: FlowerSite(grid, config, strategy, nodes))
        except BaseException as error:
            outcome["error"] = error

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


__all__ = ["FIT", "STATISTICS", "client_app", "server_app", "simulate"]
