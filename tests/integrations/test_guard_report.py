"""A stranger's loop ends in our report; PEFT's adapters are guarded in it."""

import math

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from loops import OPTIMIZERS, Module, data, loader, loop, network, own_cache, trainer  # noqa: F401
from torch import nn
from torch.optim import SGD, AdamW
from transformers import LlamaConfig, LlamaForCausalLM

from cl_bench.contracts import UsageError
from cl_bench.integrations import ContinualCallback, Guarded
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.projection.trgp import TRGP
from cl_bench.tracking import read_results, read_run


def few(t, count=64):
    x, y = data(t)
    return [(x[:count], y[:count])]


def right(model, t):
    ((x, y),) = few(t)
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    import cl_bench.integrations.report as module

    monkeypatch.setattr(module, "write_figures", lambda directory: [])


def test_a_plain_loop_ends_in_a_record(tmp_path, capsys):
    model, strategy = network(), GPM(threshold=0.97)
    guard = Guarded(model, strategy, loss=F.cross_entropy)
    optimizer = SGD(model.parameters(), lr=0.1)
    wanted = [[right(model, t) for t in range(2)]]
    with guard.report({"first": few(0), "second": few(1)}, tmp_path / "run") as report:
        for t in range(2):
            with guard.task(optimizer, sample=data(t), epochs=1):
                loop(model, optimizer, t, epochs=1)
                guard.after_epoch(train_loss=0.5)
            wanted.append([right(model, i) for i in range(2)])
    assert np.allclose(report.matrix, wanted)
    run = read_run(tmp_path / "run")
    assert run.status == "completed"
    assert run.task_names == ["first", "second"]
    assert np.allclose(run.matrix, wanted)
    acc = sum(wanted[2]) / 2
    assert math.isclose(report.summary["acc"], acc)
    assert math.isclose(report.summary["bwt"], wanted[2][0] - wanted[1][0])
    events = read_results(tmp_path / "run")
    layers = [e["layers"] for e in events if e["event"] == "layers"]
    assert layers[1]["1"]["rank"] == strategy.memory["1"].shape[1]
    assert layers[1]["1"]["applied_share"] < 0.01 < layers[1]["1"]["raw_share"]
    assert [e["train_loss"] for e in events if e["event"] == "epoch"] == [0.5, 0.5]
    assert "second" in capsys.readouterr().out


def test_how_far_a_task_moves_what_the_model_says(tmp_path):
    """KL(before || after) by hand, on so many test samples of the new task and of the old one."""
    model = network()
    guard = Guarded(model, GPM(threshold=0.97), loss=F.cross_entropy)
    optimizer = SGD(model.parameters(), lr=0.1)

    def said(t, count=20):
        with torch.no_grad():
            return model(data(t)[0][:count]).double().log_softmax(1)

    wanted = {}
    pieces = [[(x[:15], y[:15]), (x[15:40], y[15:40])] for x, y in (data(0), data(1))]
    run = tmp_path / "run"
    loaders = {"first": pieces[0], "second": pieces[1]}
    with guard.report(loaders, run, alignment=False, divergence=20) as report:
        for t, name in enumerate(loaders):
            start = [said(i) for i in range(t + 1)]
            with guard.task(optimizer, sample=data(t)):
                loop(model, optimizer, t, epochs=1)
            kl = [
                F.kl_div(said(i), s, log_target=True, reduction="batchmean")
                for i, s in enumerate(start)
            ]
            wanted[name] = dict(zip(loaders, map(float, kl), strict=False))
    assert report.divergence.keys() == wanted.keys()
    for name, values in wanted.items():
        assert report.divergence[name] == pytest.approx(values, rel=1e-4)
    assert report.divergence["second"]["first"] < 0.2 * report.divergence["second"]["second"]
    events = [e for e in read_results(run) if e.get("probe") == "divergence"]
    assert [e["values"][n]["new"] for e, n in zip(events, loaders, strict=True)] == [1, 1]
    assert events[1]["values"]["first"] == {"kl": report.divergence["second"]["first"], "new": 0}
    assert events[1]["samples"] == 20


def test_of_text_labelled_tokens_count(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    guard = Guarded(model, Finetune())
    tokens = torch.randint(20, (6, 8))
    batch = {"input_ids": tokens, "labels": tokens.where(torch.arange(8) > 4, -100)}
    with guard.report([[batch]], tmp_path / "run", alignment=False, divergence=4) as report:
        before = model(tokens[:4]).logits[:, 4:7].detach().log_softmax(2)  # of the three labelled
        optimizer = SGD(model.parameters(), lr=0.5)
        with guard.task(optimizer, sample=batch):
            model(**batch).loss.backward()
            optimizer.step()
        after = model(tokens[:4]).logits[:, 4:7].detach().log_softmax(2)
    kl = F.kl_div(after, before, log_target=True, reduction="sum") / 12
    assert report.divergence["task_0"]["task_0"] == pytest.approx(float(kl), rel=1e-4)


def test_callbacks_end_in_a_record_too(tmp_path):
    module = Module(network(), OPTIMIZERS["SGD"])
    guard = Guarded(module, GPM(threshold=0.97), loss=F.cross_entropy)
    with guard.report([few(0), few(1)], tmp_path / "run", alignment=False) as report:
        for t in range(2):
            callback = ContinualCallback(guard, sample=data(t))
            trainer(callback, epochs=1).fit(module, loader(t))
    assert np.isfinite(report.matrix).all()
    assert math.isclose(report.matrix[2, 0], right(module.network, 0))


def test_what_answers_with_the_task_id_is_told_so(tmp_path):
    model = network()
    guard = Guarded(model, TRGP(threshold=0.9), loss=F.cross_entropy)
    with guard.report([few(0), few(1)], tmp_path / "run", alignment=False):
        for t in range(2):
            with guard.task(sample=data(t)):
                loop(model, SGD(guard.param_groups(), lr=0.05), t, epochs=1)
    assert read_run(tmp_path / "run").task_id_known
    with pytest.raises(UsageError, match="task by task"):
        guard.predict(data(0)[0][:4])


def test_reports_that_cannot_be(tmp_path):
    guard = Guarded(network(), GPM())
    for loaders, said in (([], "a loader a task"), ([iter([])], "empty"), ([few(0)], "loss")):
        with pytest.raises(UsageError, match=said):
            guard.report(loaders, tmp_path / "run")
    for number in (-1, 2.5, True):
        with pytest.raises(UsageError, match=f"divergence={number}"):
            guard.report([few(0)], tmp_path / "run", alignment=False, divergence=number)
    assert not (tmp_path / "run").exists()


def test_a_loop_that_breaks_leaves_what_it_had(tmp_path):
    guard = Guarded(network(), GPM(), loss=F.cross_entropy)

    def broken():
        with guard.report([few(0)], tmp_path / "run"):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        broken()
    assert read_run(tmp_path / "run").status == "failed"
    assert guard.watching is None


# -- PEFT -----------------------------------------------------------------------------------------


def test_old_outputs_stay_where_both_factors_are_guarded():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 24, bias=False), nn.ReLU(), nn.Linear(24, 4)).double()
    config = peft.LoraConfig(r=6, target_modules=["0", "2"], init_lora_weights=False)
    free = {}
    for guarded in (True, False):
        model = peft.get_peft_model(nn.Sequential(*map(copied, base)), config)
        seeded(model)
        guard = Guarded(model, GPM(threshold=1.0), loss=F.cross_entropy)
        directions = torch.linalg.qr(torch.randn(16, 16).double())[0]
        old = torch.randn(40, 1).double() @ directions[:1]
        new = torch.randn(40, 6).double() @ directions[2:8]
        optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
        y = torch.randint(4, (40,), generator=torch.Generator().manual_seed(0))
        with guard.task(optimizer, sample=(old, y)):
            F.cross_entropy(model(old), y).backward()
            optimizer.step()
        said, begun = model(old).detach(), float(F.cross_entropy(model(new).detach(), y))
        if guarded:
            with guard.task(optimizer, sample=(new, y)):
                fit(model, optimizer, new, y)
        else:
            fit(model, optimizer, new, y)
        moved = float((model(old) - said).norm() / said.norm())
        free[guarded] = moved
        assert float(F.cross_entropy(model(new).detach(), y)) < begun / 2
    assert set(guard.strategy.memory) == {
        f"base_model.model.{i}.lora_{f}.default" for i in (0, 2) for f in "AB"
    }
    assert free[True] < 1e-8
    assert free[False] > 100 * free[True]


def copied(module):
    import copy

    return copy.deepcopy(module)


def seeded(model):
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=rng, dtype=p.dtype) * 0.3)


def fit(model, optimizer, x, y):
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
