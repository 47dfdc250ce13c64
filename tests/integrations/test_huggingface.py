"""Hugging Face's Trainer around a tiny Llama, and what a callback makes of it."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from loops import own_cache  # noqa: F401
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from cl_bench.contracts import UsageError
from cl_bench.integrations import GuardCallback, Guarded
from cl_bench.strategies.baselines.joint import Joint
from cl_bench.strategies.isolation.packnet import PackNet
from cl_bench.strategies.lowrank.o_lora import OLoRA
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.replay.er import ER
from cl_bench.strategies.svd.adaptive_svd import AdaptiveSVD


def llama(dtype=torch.float32, hidden=64):
    """Grouped queries: two heads of keys for four of queries."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=hidden,
        intermediate_size=hidden + 32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).to(dtype)


def texts(t, count=4, length=6):
    """Every task has tokens of its own."""
    rng = torch.Generator().manual_seed(t)
    tokens = torch.randint(4 + 20 * t, 24 + 20 * t, (count, length), generator=rng)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def rows(batch):
    return [{k: v[i] for k, v in batch.items()} for i in range(len(batch["labels"]))]


class InOrder(Trainer):
    """The loop's batches, one after another."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def trainer(model, t, tmp_path, *callbacks, kind=InOrder, steps=4, **options):
    options = {"learning_rate": 1e-3, "max_grad_norm": 0.0, "optim": "adamw_torch", **options}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=steps,
        per_device_train_batch_size=options.pop("batch", 2),
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **options,
    )
    return kind(
        model=model,
        args=arguments,
        train_dataset=rows(texts(t, count=8)),
        callbacks=list(callbacks),
    )


def loss_on(model, batch):
    with torch.no_grad():
        return float(model(**batch).loss)


# -- the invariant --------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_old_logits_stay_under_decay_clipping_and_accumulation(dtype, bound, tmp_path):
    moved = {}
    how = {"weight_decay": 0.1, "max_grad_norm": 0.5, "gradient_accumulation_steps": 2}
    for guarded in (True, False):
        model, old, new = llama(dtype), texts(0), texts(1, count=8)
        guard = Guarded(model, GPM(threshold=1.0))
        first = GuardCallback(guard, sample=old)
        trainer(model, 0, tmp_path, first, steps=1, **how).train()
        model.eval()
        with torch.no_grad():
            said = model(**old).logits.clone()
        begun = loss_on(model, new)
        second = [GuardCallback(guard, sample=new)] if guarded else []
        many = {**how, "learning_rate": 5e-3}
        trainer(model, 1, tmp_path, *second, steps=40, **many).train()
        model.eval()
        with torch.no_grad():
            moved[guarded] = float((model(**old).logits - said).norm() / said.norm())
        assert loss_on(model, new) < begun / 2
    assert moved[True] < bound
    assert moved[False] > 100 * moved[True]


# -- the same weights as of a plain loop, which are our engine's ----------------------------------


def plain(model, strategy, tasks=2, steps=4):
    """A loop that calls every line there is, over the same batches."""
    guard = Guarded(model, strategy)
    for t in range(tasks):
        whole = texts(t, count=8)
        set_seed(42)  # as the Trainer does when it is made
        with guard.task(sample=whole, epochs=1, steps=steps):
            optimizer = torch.optim.AdamW(guard.param_groups(), lr=1e-3, weight_decay=0.0)
            for i in range(steps):
                model.train()
                batch = guard.on_batch({k: v[2 * i : 2 * i + 2] for k, v in whole.items()})
                out = model(input_ids=batch["input_ids"]).logits
                optimizer.zero_grad()
                loss = guard.objective(batch, out) + guard.penalty(batch, out)
                loss.backward()
                optimizer.step()
    return guard


STRATEGIES = {
    "gpm": lambda: GPM(threshold=0.99),
    "ewc": lambda: EWC(100.0, samples=4),
    "er": lambda: ER(8, 2),
    "adaptive_svd": AdaptiveSVD,
    "o_lora": lambda: OLoRA(rank=2, dropout=0.0, lambda2=0.01),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_trainer_makes_the_weights_of_a_plain_loop(name, tmp_path):
    model = llama(torch.float64, hidden=16)
    twin = copy.deepcopy(model)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    plain(twin, STRATEGIES[name]())
    guard = Guarded(model, STRATEGIES[name]())
    for t in range(2):
        callback = GuardCallback(guard, sample=texts(t, count=8))
        loop = trainer(model, t, tmp_path, callback)
        callback.attach(loop)
        loop.train()
    found, wanted = model.state_dict(), twin.state_dict()
    assert found.keys() == wanted.keys() == start.keys()
    # All weights together: the model takes its loss in single precision, and where a gradient is
    # next to nothing Adam's first steps go by its sign, so that one small layer may be off by more.
    gap = sum((found[key] - value).square().sum() for key, value in wanted.items()).sqrt()
    assert gap < 1e-5 * sum(value.square().sum() for value in wanted.values()).sqrt()
    assert any(not torch.equal(found[k], v) for k, v in start.items())


@pytest.mark.parametrize("name", ["ewc", "er", "adaptive_svd"])
def test_a_trainer_that_was_not_attached_is_told_so(name, tmp_path):
    model = llama(hidden=16)
    guard = Guarded(model, STRATEGIES[name]())
    callback = GuardCallback(guard, sample=texts(0))
    with pytest.raises(UsageError, match=r"callback\.attach\(trainer\)"):
        trainer(model, 0, tmp_path, callback).train()
    callback.release()
    assert guard.tasks == 0
    assert all(p.requires_grad for p in model.parameters())


def as_completions(features):
    """What an on-policy trainer's batches hold: nothing by the names of a sample."""
    tokens = torch.stack([row["input_ids"] for row in features])
    return {"prompt_ids": tokens[:, :3], "completion_ids": tokens[:, 3:]}


class OnPolicy(InOrder):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("this Trainer does not support returning outputs")
        return model(torch.cat(list(inputs.values()), 1)).logits.square().mean()


def test_replay_has_no_place_among_a_trainers_own_completions(tmp_path):
    moved = {}
    for name, strategy in (("er", ER(8, 2)), ("free", EWC(0.0)), ("pulled", EWC(1e5))):
        model = llama(hidden=16)
        guard = Guarded(model, strategy)
        with guard.task(sample=texts(0)):  # so that there is something to replay, and to pull at
            optimizer = torch.optim.SGD(guard.param_groups(), lr=0.01)
            batch = guard.on_batch(texts(0))
            out = model(batch["input_ids"]).logits
            (guard.objective(batch, out) + guard.penalty(batch, out)).backward()
            optimizer.step()
        start = [p.detach().clone() for p in model.parameters()]
        callback = GuardCallback(guard, sample=texts(1))
        loop = trainer(model, 1, tmp_path, callback, kind=OnPolicy, remove_unused_columns=False)
        loop.data_collator = as_completions
        callback.attach(loop)
        if name == "er":
            with pytest.raises(UsageError, match=r"ER replays.*\(prompt_ids, completion_ids\)"):
                loop.train()
            callback.release()
            continue
        loop.train()
        pairs = zip(start, model.parameters(), strict=True)
        moved[name] = sum(float((p - before).detach().square().sum()) for before, p in pairs)
    assert 0 < moved["pulled"] < 0.8 * moved["free"]


def test_strategies_that_a_trainer_has_no_room_for(tmp_path):
    with pytest.raises(UsageError, match="in phases"):
        GuardCallback(Guarded(llama(hidden=16), PackNet()), sample=texts(0))
    model = llama(hidden=16)
    callback = GuardCallback(Guarded(model, Joint(), loss=F.cross_entropy), sample=texts(0))
    with pytest.raises(UsageError, match="chooses what is trained"):
        trainer(model, 0, tmp_path, callback)
    other = GuardCallback(Guarded(llama(hidden=16), GPM()), sample=texts(0))
    with pytest.raises(UsageError, match="another model"):
        trainer(model, 0, tmp_path, other)


def test_updates_stay_out_under_autocast_and_checkpointed_activations(tmp_path):
    model = llama(hidden=32)
    strategy = GPM(threshold=0.99)
    guard = Guarded(model, strategy)
    how = {"bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    for t in range(2):
        memory = dict(strategy.memory)
        layers = guard.learner.layers(strategy.protect)
        before = {m.name: m.whole().clone() for m in layers}
        callback = GuardCallback(guard, sample=texts(t))
        trainer(model, t, tmp_path, callback, **how).train()
    assert memory
    for layer in layers:
        change, M = (layer.whole() - before[layer.name]).double(), memory[layer.name]
        assert 0 < M.shape[1] < M.shape[0]
        assert (change @ M).norm() < 1e-4 * change.norm() > 0
