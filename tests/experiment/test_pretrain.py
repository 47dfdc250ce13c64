"""Pre-training is done once, kept, and the same for everybody."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from biographies import make_causal, make_model, pretrained, world

from cl_bench.contracts import Pretraining, UsageError
from cl_bench.experiment import seed_training

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]


# -- pre-training -----------------------------------------------------------------------------


def test_pretraining_is_done_once_and_gives_the_same_weights_to_everybody(cache):
    first, made = pretrained()
    again, found = pretrained()
    assert not made.from_cache
    assert found.from_cache
    assert made.fingerprint == found.fingerprint
    assert made.final_loss > 0
    for (name, a), (_, b) in zip(first.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    fresh = make_causal()
    assert any(
        not torch.equal(a, b) for a, b in zip(first.parameters(), fresh.parameters(), strict=True)
    )
    torch.nn.init.zeros_(first.heads[0].weight)
    first.reset_weights()  # back to pre-trained, not to random
    assert torch.equal(first.heads[0].weight, again.heads[0].weight)


def test_pretraining_without_a_cache_gives_the_same_weights(cache, monkeypatch, tmp_path):
    one, _ = pretrained()
    monkeypatch.setenv("CL_BENCH_CACHE", str(tmp_path / "another"))
    two, found = pretrained()
    assert not found.from_cache
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_another_seed_recipe_or_network_is_another_checkpoint(cache):
    from dataclasses import replace

    recipe = world(pretrained=True).pretraining
    names = {pretrained()[1].identity, pretrained(seed=1)[1].identity}
    names.add(pretrained(recipe=replace(recipe, learning_rate=2e-3))[1].identity)
    names.add(pretrained(recipe=replace(recipe, identity="other text"))[1].identity)
    names.add(pretrained(depth=1)[1].identity)
    names.add(pretrained(dropout=0.1)[1].identity)
    assert len(names) == 6


def test_half_a_checkpoint_is_never_used(cache):
    _, made = pretrained()
    (path,) = cache.glob("pretrained-*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="damaged"):
        _, found = pretrained()
    assert not found.from_cache
    assert found.fingerprint == made.fingerprint
    assert path.read_bytes() == whole
    assert not list(cache.glob(".*"))


def test_a_run_that_waits_takes_what_the_other_made(cache):
    script = (
        "from biographies import pretrained\n"
        "print('from cache' if pretrained()[1].from_cache else 'made')"
    )
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}",
    }
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, env=environment, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    said = sorted(run.communicate()[0].decode().strip().splitlines()[-1] for run in runs)
    assert said == ["from cache", "made"]


def test_an_unwritable_cache_costs_time_only(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("CL_BENCH_CACHE", str(blocked / "cache"))
    with pytest.warns(UserWarning, match="CL_BENCH_CACHE"):
        _, found = pretrained()
    assert not found.from_cache


def test_rates_rise_and_fall():
    recipe = Pretraining("", lambda seed: iter(()), steps=100, warmup=10, final_rate=0.1)
    rates = [recipe.rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0) == max(rates)
    assert rates[100] == pytest.approx(0.1) == min(rates)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_diverging_pretraining_says_so(cache):
    from dataclasses import replace

    recipe = replace(world(pretrained=True).pretraining, learning_rate=1e30)
    with pytest.raises(UsageError, match=r"stream\.pretrain\.learning_rate"):
        pretrained(recipe=recipe)


# -- the loop ---------------------------------------------------------------------------------


def test_seed_training_is_what_models_are_drawn_from():
    seed_training(5)
    one = make_model()
    seed_training(6)
    two = make_model()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
