"""Processes that pre-train together come to what one comes to, and keep it for others."""

import pytest
import torch
from pretraining import VARIANTS, learned
from several import start_processes

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return start_processes("pretraining.py", tmp_path_factory.mktemp("two"))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_pre_train_as_one(two, tmp_path, monkeypatch, kind, name):
    monkeypatch.setenv("CL_BENCH_CACHE", "")  # put back at the end
    wanted = learned(tmp_path, **VARIANTS[name])
    (first, again), *others = two(f"{kind}-{name}")
    assert (first["from_cache"], again["from_cache"]) == (False, True)
    assert first["loss"] == pytest.approx(wanted["loss"], rel=1e-9)
    for key, right in wanted["weights"].items():
        gap = (first["weights"][key] - right).norm() / right.norm().clamp(min=1e-9)
        assert float(gap) < 1e-9, (key, float(gap))
        for other in (again, *others[0]):
            assert torch.equal(other["weights"][key], first["weights"][key])
    assert {one["fingerprint"] for one in (first, again, *others[0])} == {first["fingerprint"]}
