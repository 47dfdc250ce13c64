"""Configurations composed outside of Hydra's own entry point."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from cl_bench.cli.explain import explain, refuse_empty, refuse_lists, searched
from cl_bench.cli.folders import conf_directory, offer_probes
from cl_bench.contracts import UsageError


def composed(words: Sequence[str]) -> tuple[DictConfig, dict[str, Any]]:
    """The configuration that overrides lead to, and which option of each group was chosen.

    Raises:
        UsageError: one of them is not what it must be.
    """
    refuse_empty(words, conf_directory())
    refused = refuse_lists(words)
    if refused:
        raise UsageError(refused)
    folders = [*(Path(folder).absolute() for folder in searched(words)), conf_directory()]
    offer_probes(folders)
    try:
        with hydra.initialize_config_dir(str(conf_directory()), version_base="1.3"):
            cfg = hydra.compose("config", list(words), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(explain(error, words, folders)) from None
    choices = dict(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices
