"""What a run will hold is planned from shapes alone, before anything is loaded."""

import functools
import json

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from toys import make_learner, make_stream, mlp

from cl_bench.cli.compose import composed
from cl_bench.cli.plan import plan, planned
from cl_bench.contracts import Memory, Strategy, UsageError
from cl_bench.experiment import CheckpointSettings, Together, check_sharded
from cl_bench.experiment.activations import Activations, estimate
from cl_bench.experiment.memory import PHASES, Layout, plan_memory
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.lowrank.o_lora import OLoRA
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.projection.rogo import ROGO
from cl_bench.strategies.svd.adaptive_svd import AdaptiveSVD

adam = functools.partial(Adam, lr=0.01)
NONE = CheckpointSettings(enabled=False)


def of(strategy, optimizer=adam, layout=None, tasks=2, **options):
    learner = make_learner(make_stream(), mlp(bias=True))
    learner._optimizer_factory = optimizer
    options = {"checkpoint": NONE, "watched": False, **options}
    made = plan_memory(learner, strategy, layout or Layout(), Activations(), tasks=tasks, **options)
    return learner, made


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(("optimizer", "kept"), [(adam, 2), (functools.partial(SGD, lr=0.1), 0)])
def test_weights_gradients_and_optimizer_are_added_up(optimizer, kept):
    learner, made = of(Finetune(), optimizer)
    whole = size(learner.parameters())
    assert made.device["weights"]["training"] == whole + size(learner.buffers())
    assert made.device["gradients"]["training"] == whole
    assert made.device.get("optimizer", {}).get("stepping", 0) == kept * whole
    assert "gradients" not in {w for w, row in made.device.items() if row.get("evaluation")}
    assert made.peak == max(map(made.total, PHASES))


def test_processes_that_share_weights_out_hold_a_part_and_put_one_block_together():
    learner, made = of(Finetune(), layout=Layout(4, 4, sharded=True, on_device=True))
    parts = sum(-(-len(p) // 4) * p[0].numel() * 4 for p in learner.parameters())
    assert made.device["weights"]["training"] == parts + size(learner.buffers())
    assert made.device["optimizer"]["training"] == 2 * parts
    blocks = [size(b.parameters()) for b in learner.blocks()]
    outside = size(learner.parameters()) - sum(blocks)
    assert made.device["weights put together"]["training"] == 2 * outside + 3 * max(blocks)
    read = outside + 2 * max(blocks)
    for phase in ("evaluation", "boundary"):
        assert made.device["weights put together"][phase] == read
    _, watched = of(Finetune(), layout=made.layout, watched=True)
    assert watched.device["weights put together"]["boundary"] == size(learner.parameters())
    _, half = of(Finetune(), layout=Layout(4, 4, sharded=True, on_device=True, casts=True))
    together = [m.device["weights put together"]["training"] for m in (half, made)]
    assert 2 * together[0] == together[1]


def test_what_puts_a_large_network_together_is_refused_with_what_to_do():
    large, small = (nn.Linear(1 << width, 1 << 15, device="meta") for width in (15, 10))
    for strategy, watched, wrong in (
        (Finetune(), True, r"hold all 1,073,\d+,\d+ weights.*add alignment\.enabled=false"),
        (ROGO(), False, r"use ROGO with other options or not at all"),
        (AdaptiveSVD(schedule="importance"), False, r"use AdaptiveSVD with other options"),
        (EWC(), True, r"add alignment\.enabled=false; use EWC"),
    ):
        check_sharded(strategy, None, small, watched)
        with pytest.raises(UsageError, match=wrong):
            check_sharded(strategy, None, large, watched)
    for strategy in (Finetune(), GPM(), AdaptiveSVD(), OLoRA()):
        check_sharded(strategy, None, large)


def test_a_strategy_says_what_it_takes_itself_and_who_does_not_is_named():
    class Holding(Strategy):
        def footprint(self, learner, tasks, processes):
            return Memory(kept=10 * tasks, boundary=7, stepping=3)

    _, made = of(Together({"a": Holding(), "b": Finetune()}), tasks=5)
    assert made.device["strategy"] == {
        **dict.fromkeys(("training", "evaluation", "checkpoint"), 50),
        "boundary": 57,
        "stepping": 53,
    }
    assert made.unknown == ()
    _, made = of(ROGO(threshold=0.9))
    assert "ROGO does not say" in made.unknown[0]
    two = Memory(boundary=3, kept=1) + Memory(boundary=5, kept=2, frozen=frozenset("a"))
    assert two == Memory(boundary=5, kept=3, frozen=frozenset("a"))


def test_adaptive_svd_trains_cores_in_place_of_matrices():
    strategy = AdaptiveSVD(start_task=0, train_rest="none")
    learner, made = of(strategy)
    own = strategy.footprint(learner, 2, 1)
    learner.begin(make_stream()[0], strategy)
    list(strategy.param_groups(learner))  # decomposes
    assert own.trained == size(strategy.restricted.parameters())
    matrices = {f"{m.name}.weight" for m in strategy.layers}
    assert own.unstepped == matrices
    learning = {n for n, p in learner.named_parameters() if p.requires_grad}
    assert own.frozen == {n for n, _ in learner.named_parameters()} - learning
    splits = [t for s in strategy.restricted.splits.values() for t in vars(s).values()]
    held = size(t for t in splits if t is not None and t.dim() > 1) + size(strategy.start.values())
    assert own.kept == held
    assert made.device["optimizer"]["training"] == 2 * (
        own.trained + size(p for n, p in learner.named_parameters() if n in learning - matrices)
    )
    shared = strategy.footprint(learner, 2, 2)
    assert own.trained / 2 <= shared.trained < own.trained


def test_no_rank_of_gpm_takes_more_than_is_planned():
    strategy, learner = GPM(1.0), make_learner(make_stream(), mlp(bias=True))
    planned_bytes = strategy.footprint(learner, 2, 1).kept
    layers = learner.layers(strategy.protect)
    for share in (0.5, 0.75, 1.0):
        strategy.memory = {
            m.name: torch.linalg.qr(
                torch.randn(m.in_features, int(share * m.in_features)).double()
            )[0]
            for m in layers
        }
        projections = [strategy.projection(m.name).to(torch.zeros(1)) for m in layers]
        held = size(strategy.memory.values())
        held += size(t for p in projections for t in (p._left, p._right))
        assert held <= planned_bytes


def test_activations_are_what_autograd_keeps():
    from texts import make_learner as texts_learner

    learner = texts_learner("gpt2")
    batch = learner.example()
    found = estimate(learner, batch, 3, 3, frozenset(), "32-true")
    assert found.unknown == ()
    weights = {p.untyped_storage().data_ptr() for p in learner.parameters()}
    held = {}

    def save(t):
        if t.untyped_storage().data_ptr() not in weights:
            held[t.untyped_storage().data_ptr()] = (t, t.untyped_storage().nbytes())
        return t

    inputs = {k: v.expand(3, *v.shape[1:]).clone() for k, v in batch.items()}
    learner.eval()
    with learner.longest(), torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        out = learner(inputs)
        learner.loss(out, inputs)
    real = sum(n for _, n in held.values()) + out.numel() * out.element_size()
    assert real == pytest.approx(found.training, rel=0.15)
    thrifty = texts_learner("gpt2", gradient_checkpointing=True)
    assert estimate(thrifty, batch, 3, 3, frozenset(), "32-true").training < 0.8 * found.training


def test_a_plan_loads_no_weights(tmp_path, capsys):
    """A folder with a configuration and no weights is enough, whatever its size."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=128_000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=2,
        num_attention_heads=32, num_key_value_heads=8, eos_token_id=1, bos_token_id=None,
    ).save_pretrained(tmp_path)  # fmt: skip
    rows = [{"prompt": f"say {i}", "completion": str(i)} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [
        *("+strategy=adaptive_svd", "+stream=chat", f"stream.data=[{tmp_path}/a.jsonl]"),
        *("stream.tokenizer=bytes", f"model.name_or_path={tmp_path}", "trainer=fsdp"),
        *("trainer.devices=8", "pack=1", "trainer.precision=bf16-mixed", "alignment.enabled=false"),
    ]
    plan(["plan=80", *words])
    said = " ".join(capsys.readouterr().out.split())
    assert "planned, not measured: GB of each of 8 processes" in said
    assert "a device: " in said
    assert "GB planned of 80 GB: fits" in said
    plan(["plan=1", *words])
    assert "planned of 1 GB: does not fit" in " ".join(capsys.readouterr().out.split())
    made, _ = planned(*composed(words), elsewhere=True)
    numbers = 2 * 128_000 * 4096 + 2 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336) + 5 * 4096
    assert made.device["weights"]["training"] == pytest.approx(4 * numbers / 8, rel=0.001)


@pytest.mark.parametrize("word", ["plan=maybe", "plan=-1", "plan=inf"])
def test_a_plan_is_asked_for_in_gigabytes(word):
    with pytest.raises(UsageError, match="use plan=true, or plan=80"):
        plan([word, "+strategy=gpm", "+stream=permuted_digits"])
