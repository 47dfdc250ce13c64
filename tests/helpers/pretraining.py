"""Pre-training for ``tests/parallel/test_pretraining.py``, in as many processes as torchrun starts.

python -m torch.distributed.run --standalone --nproc-per-node=2 tests/helpers/pretraining.py DIR
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from biographies import _Trainer, make_causal, world
from lightning.pytorch.strategies import ModelParallelStrategy
from toys import Silent

from cl_bench.experiment import pretrain
from cl_bench.parallel.ranks import rank
from cl_bench.parallel.ranks import world as processes


def recipe():
    """The world's, with a sample left over in every batch of some."""
    found = world(pretrained=True).pretraining

    def uneven(seed):
        for i, batch in enumerate(found.batches(seed)):
            yield {k: v[: 3 + i % 2] for k, v in batch.items()}

    return replace(found, batches=uneven, identity="uneven")


def learned(cache, kind="ddp", **options):
    """Weights, fingerprint, loss, and whether they came from the cache."""
    os.environ["CL_BENCH_CACHE"] = str(cache)
    stream = world(pretrained=True)
    learner = make_causal(stream=stream).double()
    learner.remember_initial_state()
    if processes() > 1 and kind == "fsdp":
        learner.shard()

    def trainer(callbacks=(), **more):
        several = {"ddp": "ddp", "fsdp": ModelParallelStrategy()}[kind]  # an object for each
        how = several if processes() > 1 else "auto"
        given = {"devices": processes(), "strategy": how, **options, **more}
        return _Trainer()(callbacks, **given)

    came = pretrain(learner, recipe(), trainer, 0, Silent())
    return {
        "weights": {k: v.detach().clone() for k, v in learner.weights().items()},
        "loss": came.final_loss,
        "fingerprint": came.fingerprint,
        "from_cache": came.from_cache,
    }


VARIANTS = {
    "plain": {},
    "clipped": {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
}


def main(directory):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for kind in ("ddp", "fsdp"):
        for name, options in VARIANTS.items():
            cache = directory / f"cache-{kind}-{name}"
            torch.save(
                [learned(cache, kind, **options), learned(cache, kind, **options)],
                directory / f"{kind}-{name}-rank{rank()}.pt",
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
