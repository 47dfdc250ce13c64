"""Where Slurm is installed and nobody asked for a job, runs say nothing of it."""

import warnings

import pytest
from lightning import Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from cl_bench.experiment import quiet_lightning
from cl_bench.parallel.joining import are_there


@pytest.fixture
def login_node(tmp_path, monkeypatch):
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.usefixtures("login_node")
def test_no_hint_to_use_srun():
    with pytest.warns(match="`srun` command is available"):  # what Lightning says by itself
        assert not SLURMEnvironment.detect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not are_there()
        with quiet_lightning():
            Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
