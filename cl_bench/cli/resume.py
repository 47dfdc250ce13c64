"""``python -m cl_bench resume=<run directory>``: go on with a run that ended early."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from cl_bench.errors import UsageError


def resume(arguments: Sequence[str]) -> None:
    """Go on with the run whose directory ``resume=...`` names, in its own configuration.

    Args:
        arguments: the command line, which may hold nothing else.

    Raises:
        UsageError: it does, the directory holds no run, or the run's process is still there.
    """
    others = [a for a in arguments if not a.startswith("resume=")]
    if others or len(arguments) > 1:
        raise UsageError(
            f"resume=... stands alone, but there is {' '.join(others) or 'another one'}: a run "
            "goes on with the settings it began with; for other settings start a new run"
        )
    directory = Path(arguments[0].removeprefix("resume="))
    # torch and lightning load here, not for a listing.
    import torch

    from cl_bench.cli.build import run_config
    from cl_bench.tracking.record import CHOICES, COMMAND, CONFIG, is_finished

    if not (directory / CONFIG).is_file():
        raise UsageError(
            f"resume={directory}: that directory holds no run ({CONFIG} is missing); give the "
            "directory that the run named in its first line"
        )
    if is_finished(directory):
        print(f"{directory} is finished: there is nothing to resume")
        return
    cfg = OmegaConf.load(directory / CONFIG)
    assert isinstance(cfg, DictConfig)
    cfg.run_dir = str(directory)
    with contextlib.suppress(FileNotFoundError, KeyError):
        # Sums are rounded in another order with another number of threads.
        environment = json.loads((directory / "environment.json").read_text())
        torch.set_num_threads(int(environment["threads"]))
    choices = {}
    with contextlib.suppress(FileNotFoundError):
        choices = json.loads((directory / CHOICES).read_text())
    run_config(cfg, (directory / COMMAND).read_text().strip(), choices, resume=True)
