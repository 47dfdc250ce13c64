"""The seams of the contract, each with a toy strategy that needs it, under the laws."""

import laws
import pytest
import torch
from cases import RefusedError, Setting
from seams import SEAMS
from test_every_strategy import alone, lawful, one_thread, plain  # noqa: F401

from cl_bench.federation import FederatedEngine

each = pytest.mark.parametrize("name", SEAMS)


@each
def test_state_holds_all(name):
    laws.state_round_trip(name)


@each
def test_a_kill_inside_the_last_stage_changes_nothing(name, tmp_path):
    laws.kill_and_resume(name, tmp_path)


@each
def test_two_processes(name, alone, pair):  # noqa: F811
    laws.two_processes(name, alone(name), pair)


@each
def test_packs(name, alone, tmp_path):  # noqa: F811
    lawful(name, lambda n: laws.packed(n, alone(n), tmp_path / "run"))


@each
def test_accumulation(name, alone, tmp_path):  # noqa: F811
    laws.accumulation(name, alone(name), tmp_path / "run")


@each
def test_no_trace(name):
    laws.no_trace(name)


REFUSED = {
    "HalfWeighted": "learns from one site's data",
    "Corrected": "learns from one site's data",
    "TwoLosses": "learns from one site's data",
}


@each
def test_in_a_federation(name, tmp_path, monkeypatch):
    monkeypatch.setattr(FederatedEngine, "figures", lambda self, directory: [])
    if name in REFUSED:
        with pytest.raises(RefusedError, match=REFUSED[name]):
            Setting(name, federated=True)
        return
    setting = Setting(name, federated=True, dtype=torch.float32)
    before = {k: v.clone() for k, v in setting.learner.weights().items()}
    found = setting.conduct(tmp_path / "run")
    laws.require_finite(found)
    assert any(not torch.equal(found.weights[k], v) for k, v in before.items())
