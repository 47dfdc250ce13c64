"""What ``doctor`` finds, and when it says that no run will work."""

import importlib
import importlib.metadata
import os

import pytest
import torch

doctor = importlib.import_module("cl_bench.cli.doctor")


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    """No network, no environment of whoever runs the tests."""
    monkeypatch.setattr(doctor, "hub_reachable", lambda: False)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("CL_BENCH_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("quiet")
def test_all_is_looked_at(cli):
    status, out, _ = cli("doctor", "--offline")
    assert status == 0
    for about in ("versions", "devices", "threads", "disk", "hub", "wandb"):
        assert f"\n{about} " in f"\n{out}"
    assert f"torch {torch.__version__}" in out
    assert "cache: " in out
    assert "not asked" in out


def told(findings, state):
    return [finding.said for finding in findings if finding.state == state]


@pytest.mark.usefixtures("quiet")
def test_a_package_that_is_too_old_stops_runs(cli, monkeypatch):
    true = importlib.metadata.version
    old = {"torch": "2.1.0", "lightning": "2.5.0"}
    monkeypatch.setattr(doctor, "version", lambda name: old.get(name) or true(name))
    assert told(doctor.versions(), "bad") == ["torch 2.1.0 is not >=2.6: pip install 'torch>=2.6'"]
    status, out, _ = cli("doctor", "--offline")
    assert status == doctor.AMISS
    assert "has to be put right" in out


def test_an_extra_that_is_not_whole_is_a_note(monkeypatch):
    true = importlib.metadata.version

    def version(name):
        if name == "rapidfuzz":
            raise importlib.metadata.PackageNotFoundError(name)
        return true(name)

    monkeypatch.setattr(doctor, "version", version)
    found = list(doctor.versions())
    (line,) = [said for said in told(found, "note") if said.startswith("extra language:")]
    assert line == (
        "extra language: rapidfuzz is not installed; for its part: pip install 'cl_bench[language]'"
    )
    assert not told(found, "bad")


@pytest.mark.usefixtures("quiet")
def test_folders_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: "cache" not in str(path))
    (tmp_path / "cache").mkdir()
    assert told(doctor.disk(), "note") == [
        f"made data to {tmp_path}/cache: cannot write there, use CL_BENCH_CACHE=<folder>"
    ]
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert told(doctor.disk(), "bad") == ["runs go to runs: cannot write there, use run_dir=..."]
    assert os.access is doctor.os.access


@pytest.mark.usefixtures("quiet")
def test_the_hub_and_wandb(monkeypatch, tmp_path):
    assert "does not answer" in told(doctor.hub(offline=False), "note")[0]
    monkeypatch.setattr(doctor, "hub_reachable", lambda: True)
    assert "answers" in told(doctor.hub(offline=False), "good")[0]
    assert "wandb login" in told(doctor.wandb(), "note")[0]
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert "logger.mode=online works" in told(doctor.wandb(), "good")[0]
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert "wandb.example.org" in told(doctor.wandb(), "note")[0]
