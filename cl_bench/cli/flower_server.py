"""The federation's server as a Flower app: the whole experiment, on a SuperLink."""

import json

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from omegaconf import OmegaConf

from cl_bench.cli.run import run_config
from cl_bench.federation.flower import FlowerSite, as_json


def serve(grid: Grid, context: Context) -> None:
    """Run the experiment whose configuration came along."""
    given = json.loads(str(context.run_config["cl_bench"]))
    cfg = OmegaConf.create(given["config"])
    nodes = int(context.run_config["nodes"])
    run_config(
        cfg,
        str(context.run_config["command"]),
        given["choices"],
        "start" if context.run_config["resume"] == "start" else bool(context.run_config["resume"]),
        {
            "site": lambda strategy: FlowerSite(
                grid, as_json(given["config"], given["choices"]), strategy, nodes
            )
        },
    )


server_app = ServerApp()
server_app.main()(serve)
