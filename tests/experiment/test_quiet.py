"""What Lightning says of every Trainer, and would say of every task."""

import warnings

from lightning import Trainer

from cl_bench.experiment import quiet_lightning


def test_a_cluster_at_hand_is_no_reason_to_warn(monkeypatch, tmp_path):
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    for quiet in (False, True):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if quiet:
                with quiet_lightning():
                    Trainer(**options)
            else:
                Trainer(**options)
        assert any("`srun` command" in str(w.message) for w in said) != quiet
