"""Where configurations lie."""

from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig


def conf_directory() -> Path:
    """Where our configs are: in the wheel inside the package, in a checkout beside it."""
    package = Path(__file__).parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def search_path() -> list[Path]:
    """Folders on Hydra's search path."""
    loader: Any = GlobalHydra.instance().config_loader()
    paths = [entry.path for entry in loader.get_search_path().get_path()]
    # The file system's paths only; Hydra's own packages have nothing to list.
    plain = [p.removeprefix("file://") for p in (*paths, *HydraConfig.get().searchpath) if p]
    return [Path(p) for p in plain if "://" not in p]
