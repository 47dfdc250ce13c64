"""O-LoRA through the engine: kills, exports, targets and options."""

import functools
import sys
from pathlib import Path

import hydra
import pytest
import torch
from biographies import make_causal, make_model, world
from lightning import Trainer
from pairs import o_lora, seq_lora, steps
from texts import prompts
from torch.optim import SGD, Adam, AdamW
from toys import make_engine

from cl_bench.cli.export import export
from cl_bench.cli.run import run_config
from cl_bench.contracts import UsageError
from cl_bench.experiment import (
    AlignmentSettings,
    CheckpointSettings,
    EvalSettings,
    Identity,
    LoopSettings,
    Together,
    conduct,
)
from cl_bench.experiment.probes import ProbeSettings
from cl_bench.experiment.probes.landscape import LandscapeSettings
from cl_bench.experiment.probes.updates import UpdateSettings
from cl_bench.learners import Causal, Classifier, language
from cl_bench.models import MLP, t5
from cl_bench.strategies.lowrank.o_lora import OLoRA
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.replay.er import ER
from cl_bench.tasks.permuted_digits import PermutedDigits
from cl_bench.tracking import read_results
from runs import differences, final_weights

pytestmark = pytest.mark.usefixtures("no_pictures")

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[3]


# -- through the engine -------------------------------------------------------------------------


class Killed(BaseException):
    """The process is gone."""


class Mortal(Causal):
    dies_at, batches = -1, 0

    def _learn(self, batch):
        if self.batches == self.dies_at:
            raise Killed
        self.batches += 1
        return super()._learn(batch)


PROBES = ProbeSettings(
    early=(0, 1),
    updates=UpdateSettings(enabled=True),
    landscape=LandscapeSettings(True, 10, (0, 1, 2), (0, 1, 2)),
)


def conducted(directory, make, dies_at=-1, resume=False, probe=PROBES):
    optimizer = functools.partial(AdamW, lr=1e-2)
    learner = Mortal(world(), make_model(dropout=0.1), optimizer, 8, 0)
    learner.dies_at = dies_at
    trainer = functools.partial(
        Trainer,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    strategy = make()
    conduct(
        world(),
        strategy,
        learner,
        trainer,
        Identity("toy", "o_lora", "seed: 0\n", "python -m cl_bench"),
        loop=LoopSettings(0, 8),
        evaluation=EvalSettings(dense=(0, 1) if probe else ()),
        alignment=AlignmentSettings(samples=20, batches=2),
        probe=probe,
        checkpoint=CheckpointSettings(True, 2, 2),
        run_dir=directory,
        resume=resume,
    )
    return learner, strategy


@pytest.mark.parametrize("make", [functools.partial(o_lora, lambda2=0.1), seq_lora])
def test_a_killed_run_goes_on_bit_for_bit_and_probes_change_nothing(tmp_path, make):
    learner, _ = conducted(tmp_path / "whole", make)
    first = learner.batches - learner.learned_steps  # batches of the first task
    assert min(first, learner.learned_steps) >= 3
    for at in (first - 1, first + 2):
        killed = tmp_path / f"killed{at}"
        with pytest.raises(Killed):
            conducted(killed, make, dies_at=at)
        newest = max(p.name for p in (killed / "checkpoints").glob("*.pt"))
        assert not newest.endswith("step000000000.pt")  # inside a task
        conducted(killed, make, resume=True)
        assert differences(tmp_path / "whole", killed) == []
        assert final_weights(tmp_path / "whole") == final_weights(killed)
    conducted(tmp_path / "plain", make, probe=None)
    plain, probed = (
        {k: v for k, v in final_weights(tmp_path / d).items() if not k.startswith("/observer")}
        for d in ("plain", "whole")
    )
    assert plain == probed


def test_observers_see_what_the_network_computes_not_the_frozen_weight(tmp_path):
    """Also between steps, with adapters in place; a shared pair's task is the task's own change."""
    learner, _ = conducted(tmp_path, seq_lora)
    events = read_results(tmp_path)
    layers = [e["layers"] for e in events if e["event"] == "layers"]
    name = "backbone.layers.0.attention.query_key_value"
    assert not any("lora" in layer or "base_layer" in layer for layer in layers[1])
    for found in layers:
        assert found[name]["relative_update"] > 0
        assert found["backbone.layers.0.mlp.dense_h_to_4h"]["relative_update"] == 0
        early, late = (found[name][f"wupd/{w}/rel_norm"] for w in ("early", "late"))
        assert min(early, late) > 0
        assert early + late * (1 + early) > 0.99 * found[name]["relative_update"]
    assert 0 < layers[1][name]["applied_share"] <= 1
    (plane,) = [e for e in events if e["event"] == "probe" and e["probe"] == "landscape"]
    assert plane["task"] == 1
    own = world()[1].sample(10, 0)
    end = float(learner.loss(learner.eval()(own), own))
    assert plane["anchors"][world()[1].name][2] == pytest.approx(end, rel=1e-5)


CUT = (
    *("stream.people=40", "stream.new_people=20", "stream.epochs=[1,2]", "eval.dense=[]"),
    *("stream.pretrain.steps=5", "stream.strangers=8", "trainer.accelerator=cpu"),
    "logger.mode=disabled",
)


def configured(directory, *overrides):
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = hydra.compose(
            "config", ["+stream=biography/smoke", *CUT, f"run_dir={directory}", *overrides]
        )
    return run_config(cfg, "python -m cl_bench", {})


def test_without_its_penalty_it_is_inc_lora_bit_for_bit_and_exports_merged(tmp_path, monkeypatch):
    monkeypatch.setenv("CL_BENCH_CACHE", str(tmp_path / "cache"))
    inc = configured(tmp_path / "inc", "+strategy=inc_lora")
    configured(tmp_path / "zero", "+strategy=o_lora", "strategy.lambda1=0")
    configured(tmp_path / "o", "+strategy=o_lora")
    weights = {name: final_weights(tmp_path / name) for name in ("inc", "zero", "o")}
    assert weights["inc"] == weights["zero"]
    assert weights["inc"] != weights["o"]
    folder = export([f"export={tmp_path / 'inc'}"])
    model = transformers.GPTNeoXForCausalLM.from_pretrained(folder).eval()
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected = inc.learner.eval()({"input_ids": tokens})
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, atol=1e-5, rtol=1e-4)


def test_without_peft_it_says_what_to_install(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    status, _, err = cli("+strategy=o_lora", "+stream=biography/smoke", *CUT)
    assert status != 0
    assert "pip install 'cl_bench[language]'" in err
    assert len(err.strip().splitlines()) <= 3


# -- targets and options ------------------------------------------------------------------------


def tiny(kind):
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "vocab_size": 200}
    more = {"num_hidden_layers": 1, "intermediate_size": 16, "num_key_value_heads": 2}
    configs = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}
    return transformers.AutoModelForCausalLM.from_config(configs[kind](**sizes, **more))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_defaults_are_queries_and_values(kind):
    learner = Causal(world(), tiny(kind), functools.partial(SGD, lr=0.1), 8, 0)
    ends = {m.name.rpartition(".")[2] for m in OLoRA().maps(learner)}
    assert ends == {"q_proj", "v_proj"}


def encoder_decoder(optimizer):
    torch.manual_seed(1)
    network = t5(259, depth=1, width=16, heads=2, feed_forward=32, dropout=0.1)
    return language(prompts(), network, optimizer, 8, 0)


@pytest.mark.parametrize("make", [o_lora, seq_lora])
def test_an_encoder_decoder_learns_in_both_attentions_and_answers_alike_when_merged(make):
    learner, strategy = encoder_decoder(functools.partial(AdamW, lr=1e-2)), make()
    names = list(learner.state_dict())
    batch = learner.prompts[0].sample(6, 0)
    for t, task in enumerate(learner.prompts):
        steps(learner, strategy, task, boundary=False)
        learner.eval()
        where = {name.partition("block.0.layer.")[2] for name in strategy.layers}
        assert where == {f"0.SelfAttention.{x}" for x in "qv"} | {
            f"1.EncDecAttention.{x}" for x in "qv"
        }
        assert len(strategy.layers) == 6
        with torch.no_grad():
            adapted, answers = learner(batch), learner.answers(batch)
            strategy.consolidate(learner, task, {})
            strategy.release(learner)
            torch.testing.assert_close(learner(batch), adapted, atol=1e-4, rtol=1e-3)
        assert learner.answers(batch) == answers
        assert list(learner.state_dict()) == names
        assert {v["lora_rank"] for v in strategy.metrics().values()} == {
            2 if make is seq_lora else 2 * (t + 1)
        }


def test_targets_are_ends_of_names_or_all_but_heads():
    learner = make_causal()
    picked = [m.name for m in OLoRA(targets=["dense"]).maps(learner)]
    assert picked == [f"backbone.layers.{i}.attention.dense" for i in range(2)]
    every = [m.name for m in OLoRA(targets="all").maps(learner)]
    assert len(every) == 8
    assert not any(name.startswith("heads") for name in every)
    strategy = OLoRA(rank=2, targets="all")
    steps(learner, strategy, world()[0], count=1)
    assert set(strategy.past) == set(every)
    with pytest.raises(UsageError, match=r"strategy.targets=\['query'\] is the end of no layer"):
        OLoRA(targets=["query"]).check(learner)
    with pytest.raises(UsageError, match=r"strategy.targets=\['query'\] is the end of no layer"):
        OLoRA(targets=["dense", "query"]).check(learner)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "strategy.rank=0"),
        ({"alpha": 0}, "strategy.alpha=0"),
        ({"dropout": 1.0}, "strategy.dropout=1.0"),
        ({"lambda1": -1}, "strategy.lambda1=-1"),
        ({"lambda2": {"*": -1}}, "strategy.lambda2="),
        ({"lambda1": {"a": 1}}, r"add a last pattern '\*'"),
        ({"targets": "q"}, "must be a list of text, null or all"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(UsageError, match=words):
        OLoRA(**options)


def test_it_learns_classes_where_its_targets_are_named():
    """The head trains beside the pairs; the layers below move by what has rank r, or not at all."""
    stream = PermutedDigits(num_tasks=2)
    learner = Classifier(stream, MLP((64,), (16, 16)), functools.partial(Adam, lr=1e-2), 32, 0)
    start = {name: weight.clone() for name, weight in learner.weights().items()}
    with pytest.raises(UsageError, match="PEFT knows no default"):
        OLoRA().check(learner)
    engine = make_engine(learner, OLoRA(rank=2, targets="all"), epochs=1, batch_size=32)
    engine.learn(stream[0], OLoRA().plan(stream, 0))
    moved = {name: weight - start[name] for name, weight in learner.weights().items()}
    assert float(moved["heads.0.weight"].abs().max()) > 0
    for name in ("backbone.fc1.weight", "backbone.fc2.weight"):
        assert int(torch.linalg.matrix_rank(moved[name], rtol=1e-4)) == 2


def test_a_penalty_on_frozen_weights_is_refused():
    with pytest.raises(UsageError, match=r"o_lora freezes the network's weights.*ewc would know"):
        Together({"o_lora": OLoRA(), "ewc": EWC()})
    Together({"o_lora": OLoRA(), "er": ER(10)})
