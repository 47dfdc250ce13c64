"""What each of two processes holds of a network that they share out, from moment to moment."""

import functools
import gc
import tempfile
from pathlib import Path

import torch
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from live import Live
from texts import prompts
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.utils._pytree import tree_leaves

from cl_bench.experiment import (
    AlignmentSettings,
    CheckpointSettings,
    EvalSettings,
    Identity,
    LoopSettings,
    conduct,
)
from cl_bench.learners import language
from cl_bench.parallel.ranks import rank
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.lowrank.o_lora import OLoRA
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.svd.adaptive_svd import AdaptiveSVD

DEPTH, WIDTH = 5, 40
STRATEGIES = {
    "finetune": Finetune,
    "gpm": functools.partial(GPM, samples=6),
    "adaptive_svd": functools.partial(AdaptiveSVD, start_task=0),
    "o_lora": functools.partial(OLoRA, rank=2),
}


class Held(Live):
    """Follows tensors, among them those that are a whole weight, or its gradient.

    Attributes:
        blocks: the most blocks that were put together at a time.
        whole: the most bytes of whole weights at a time, gradients included.
    """

    def __init__(self, network):
        self.network, self.blocks, self.whole = network, 0, 0
        self.shapes = {tuple(p.shape) for p in network.parameters() if p.dim() > 1}
        self.shapes |= {(n * d,) for n, d in self.shapes}  # as they travel
        self.like = {}
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [self.note(t) for t in tree_leaves(out) if isinstance(t, Tensor)]
        # Places for weights that travel are there already, and empty before. What is frozen is seen
        # where a layer computes with it: no gradient of it is made.
        used = func is torch.ops.aten.t.default and tuple(args[0].shape) in self.shapes
        if func.namespace in ("fsdp", "c10d") or -1 in made or used:
            self.look()
        return out

    def note(self, tensor):
        plain = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        found = super().note(tensor)
        weight = plain.dtype == torch.float32 and tuple(plain.shape) in self.shapes
        if found:
            self.like[id(plain.untyped_storage())] = weight
        return -1 if found and weight else found

    def look(self):
        super().look()
        alive = {key: ref() for key, ref in self.storages.items() if self.like.get(key)}
        self.whole = max(self.whole, sum(s.nbytes() for s in alive.values() if s is not None))
        opened = sum(
            any(self.is_whole(p) for p in part.parameters())
            for part in self.network.modules()
            if isinstance(part, FSDPModule) and part is not self.network
        )
        self.blocks = max(self.blocks, opened)

    def is_whole(self, parameter):
        """Whether a weight of the network's is all here."""
        here = not isinstance(parameter.data, DTensor)
        return (
            here and tuple(parameter.shape) in self.shapes and parameter.untyped_storage().nbytes()
        )

    def begin(self):
        """Forget what was."""
        gc.collect()
        self.blocks = self.whole = 0


def held(name):
    """What this process held of a tiny LLaMA in a run of two tasks, generated answers among it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    stream = prompts(rows=9)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(stream.vocabulary),
            hidden_size=WIDTH,
            intermediate_size=52,
            num_hidden_layers=DEPTH,
            num_attention_heads=4,
            num_key_value_heads=1,
            max_position_embeddings=96,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )
    learner = language(stream, model, functools.partial(AdamW, lr=3e-3), batch_size=8, seed=0)
    del model
    sizes = {n: p.numel() * p.element_size() for n, p in learner.named_parameters() if p.dim() > 1}
    inside = sum(n for key, n in sizes.items() if ".layers.0." in key)
    strategy = STRATEGIES[name]()
    watch = Held(learner.network)
    share = learner.shard

    def shard(*args, **more):
        share(*args, **more)
        watch.begin()

    learner.shard = shard
    owned = {}
    setup = strategy.setup

    def noting(*args):
        setup(*args)
        layers = getattr(getattr(strategy, "owners", None), "mine", ())
        owned["bytes"] = sum(m.in_features * m.out_features * 4 for m in layers)

    strategy.setup = noting
    with tempfile.TemporaryDirectory() as directory, watch:
        conduct(
            stream,
            strategy,
            learner,
            functools.partial(_trainer),
            Identity("toy", name, "seed: 0\n", "python -m cl_bench"),
            loop=LoopSettings(0, 8),
            evaluation=EvalSettings(max_samples=3),
            alignment=AlignmentSettings(enabled=False),
            checkpoint=CheckpointSettings(enabled=False),
            run_dir=Path(directory) / "run",
            sharded=True,
        )
        found = {"blocks": watch.blocks, "whole": watch.whole}
        watch.begin()
        with learner.put_together():
            watch.look()
        together = {"blocks": watch.blocks, "whole": watch.whole}
    return {
        "rank": rank(),
        "found": found,
        "together": together,
        "block": inside,
        "outside": sum(sizes.values()) - DEPTH * inside,
        "owned": owned["bytes"],
    }


def _trainer(**more):
    return Trainer(
        accelerator="cpu",
        strategy=ModelParallelStrategy(),
        devices=2,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **more,
    )
