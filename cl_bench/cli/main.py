"""The entry point: compose a configuration with Hydra, check it, run it."""

import difflib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

import cl_bench
from cl_bench.cli.listing import print_listing
from cl_bench.contracts import UsageError

FAILED = 2
"""Exit status after an error that the user can put right."""


def conf_directory() -> Path:
    """Where our configs are: in the wheel inside the package, in a checkout beside it."""
    package = Path(cl_bench.__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def main() -> int:
    """Run what the command line says; returns the exit status."""
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    # Hydra then hands every error to us instead of printing it with a traceback.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        require_own_tasks_package()
        hydra.main(version_base="1.3", config_path=str(conf_directory()), config_name="config")(
            _job
        )()
    except (UsageError, HydraException, OmegaConfBaseException) as error:
        if wants_traceback:
            raise
        message = str(error).strip()
        if isinstance(error, ConfigCompositionException):
            message = f"{message}{_known_keys(message)}"
        Console(stderr=True).print(
            f"error: {message}", style="bold red", highlight=False, markup=False, soft_wrap=True
        )
        return FAILED
    return 0


def _job(cfg: DictConfig) -> float | None:
    """One job of Hydra's; returns the final average accuracy, which sweepers maximise."""
    if "strategy" not in cfg:
        if "stream" in cfg:
            raise UsageError(
                "no strategy is named: add one, for example +strategy=gpm "
                "(python -m cl_bench lists them)"
            )
        print_listing(_search_path(), Console(soft_wrap=False))
        return None
    from cl_bench.cli.build import run_config  # torch and lightning load here, not for a listing

    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        result = run_config(cfg, command(), dict(HydraConfig.get().runtime.choices))
        return float(result.summary["acc"])
    except UsageError as error:
        if multirun:
            number = HydraConfig.get().job.num
            print(f"job {number} failed: {error}", file=sys.stderr, flush=True)
        raise


def command() -> str:
    """The command that runs exactly this job again."""
    quoted = [o if _plain(o) else f"'{o}'" for o in HydraConfig.get().overrides.task]
    return " ".join(["python -m cl_bench", *quoted])


def _plain(override: str) -> bool:
    return all(c.isalnum() or c in "+-_=./,:~@" for c in override)


def require_own_tasks_package() -> None:
    """Raise :class:`UsageError` if somebody else's ``tasks`` would be imported instead of ours."""
    ours = Path(cl_bench.__file__).resolve().parent.parent / "tasks"
    spec = importlib.util.find_spec("tasks")
    origin = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
    if origin is None or origin.parent != ours:
        raise UsageError(
            f"the package 'tasks' of cl_bench ({ours}) is shadowed by {origin}: rename that file "
            "or folder, or start from another directory (cl-bench ... instead of "
            "python -m cl_bench keeps the current directory off the import path)"
        )


def _search_path() -> list[Path]:
    """Folders on Hydra's search path."""
    loader: Any = GlobalHydra.instance().config_loader()
    paths = [entry.path for entry in loader.get_search_path().get_path()]
    return [Path(p.removeprefix("file://")) for p in paths if p and not p.startswith("pkg://")]


def _known_keys(message: str) -> str:
    """For a key that does not exist: those that do, the likeliest first."""
    key = message.split("'")[1] if message.startswith("Could not override '") else ""
    group, _, wrong = key.rpartition(".")
    if not wrong:
        return ""
    others = [a for a in sys.argv[1:] if "=" in a and not a.lstrip("+~").startswith(f"{key}=")]
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(conf_directory()), version_base="1.3"):
            composed = hydra.compose("config", [o for o in others if "," not in o])
        node = OmegaConf.select(composed, group) if group else composed
        known = [str(k) for k in node] if isinstance(node, DictConfig) else []
    except HydraException:
        return ""
    close = difflib.get_close_matches(wrong, known, n=1)
    hint = f"\nDid you mean {f'{group}.' if group else ''}{close[0]}?" if close else ""
    return f"\n{group or 'the configuration'} has: {', '.join(known)}.{hint}" if known else ""
