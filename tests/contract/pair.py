"""Two processes that train together, kept alive: each job is the name of a case, or a function."""

import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

PATIENCE_SECONDS = 120


def serve(rank, store, connection):
    """Run what is asked for, until None comes."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "pair",
    }
    import torch
    import torch.distributed as dist
    from cases import RefusedError

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=PATIENCE_SECONDS),
    )
    quiet()
    while (name := connection.recv()) is not None:
        began = time.process_time()
        try:
            answer = called(name) if ":" in name else learned(name)
        except RefusedError as refusal:
            answer = ("refused", str(refusal))
        except Exception:
            answer = ("error", traceback.format_exc())
        # As bytes: tensors would travel through shared memory that ends with this process.
        connection.send_bytes(packed((*answer, time.process_time() - began)))
    dist.destroy_process_group()


def learned(name):
    """What a case comes to."""
    from cases import Setting

    with tempfile.TemporaryDirectory() as directory:
        run = Setting(name).conduct(Path(directory) / "run")
    return "run", (run.weights, run.state, run.matrix)


def called(name):
    """What ``module:function:argument`` gives."""
    module, function, argument = name.split(":")
    return "value", getattr(importlib.import_module(module), function)(argument)


def quiet():
    """No pictures and no tables."""
    module = sys.modules["cl_bench.experiment.conduct"]
    module.write_figures = module.write_probe_figures = lambda directory: []
    module.print_run = lambda directory, console: None


def packed(value):
    import io

    import torch

    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


class Pair:
    """The two, from outside. Calling it with a name gives what both came to.

    ``module:function:argument`` names a function that both call, and gives what it gave them.
    """

    def __init__(self, directory):
        context = multiprocessing.get_context("spawn")
        self.ends, self.processes = [], []
        for rank in range(2):
            here, there = context.Pipe()
            self.ends.append(here)
            process = context.Process(target=serve, args=(rank, directory / "store", there))
            process.start()
            self.processes.append(process)
        self.seconds = {}

    def __call__(self, name):
        import io

        import torch
        from cases import RefusedError, Run

        for end in self.ends:
            end.send(name)
        found, seconds = [], 0.0
        for end in self.ends:
            assert end.poll(PATIENCE_SECONDS), f"{name}: two processes wait for each other"
            answer = torch.load(io.BytesIO(end.recv_bytes()), weights_only=False)
            found.append(answer[:2])
            seconds += answer[2]
        self.seconds[name] = seconds
        for kind, value in found:
            if kind == "refused":
                raise RefusedError(value)
            assert kind != "error", value
        return [Run(*value) if kind == "run" else value for kind, value in found]

    def close(self):
        for end, process in zip(self.ends, self.processes, strict=True):
            if process.is_alive():
                end.send(None)
            process.join(10)
            if process.is_alive():
                process.kill()
