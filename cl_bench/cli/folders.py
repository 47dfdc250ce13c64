"""Where Hydra looks for configurations."""

from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from cl_bench.places import conf_directory, offer_probes

__all__ = ["conf_directory", "offer_probes", "search_path"]


def search_path() -> list[Path]:
    """Folders on Hydra's search path."""
    loader: Any = GlobalHydra.instance().config_loader()
    paths = [entry.path for entry in loader.get_search_path().get_path()]
    # The file system's paths only; Hydra's own packages have nothing to list.
    plain = [p.removeprefix("file://") for p in (*paths, *HydraConfig.get().searchpath) if p]
    return [Path(p) for p in plain if "://" not in p]
