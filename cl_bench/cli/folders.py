"""Where configurations lie."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from cl_bench.cli.listing import options


def conf_directory() -> Path:
    """Where our configs are: in the wheel inside the package, in a checkout beside it."""
    package = Path(__file__).parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def offer_probes(directories: Sequence[Path]) -> None:
    """Tell Hydra what ``probe: every`` is: what lies in ``probe`` of the folders, by its name.

    A defaults list names files one by one, and nothing of ours does: a probe is there for being
    in the folder.

    Args:
        directories: folders with configs.
    """
    names = sorted(options(directories, "probe"))
    node = {"defaults": [{f"/probe@{name.replace('/', '_')}": name} for name in names]}
    ConfigStore.instance().store("every", node, group="probe", provider="cl_bench")


def search_path() -> list[Path]:
    """Folders on Hydra's search path."""
    loader: Any = GlobalHydra.instance().config_loader()
    paths = [entry.path for entry in loader.get_search_path().get_path()]
    # The file system's paths only; Hydra's own packages have nothing to list.
    plain = [p.removeprefix("file://") for p in (*paths, *HydraConfig.get().searchpath) if p]
    return [Path(p) for p in plain if "://" not in p]


offer_probes([conf_directory()])
