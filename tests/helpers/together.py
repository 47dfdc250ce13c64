"""Runs for ``tests/parallel``, in as many processes as torchrun starts, or in one.

python -m torch.distributed.run --standalone --nproc-per-node=2 \\
    tests/helpers/together.py DIR double|single|language|interrupted|go_on
"""

import functools
import itertools
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from texts import TEXTS
from texts import make_learner as make_text_learner
from texts import make_stream as make_texts
from torch import nn
from torch.optim import SGD, Adam
from toys import DIM, WIDTH, make_stream, mlp

from cl_bench.experiment import (
    AlignmentSettings,
    CheckpointSettings,
    EvalSettings,
    Identity,
    LoopSettings,
    Together,
    conduct,
)
from cl_bench.learners import Classifier
from cl_bench.parallel.ranks import rank, world
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.baselines.joint import Joint
from cl_bench.strategies.isolation.freeze import Freeze
from cl_bench.strategies.lowrank.inc_lora import IncLoRA
from cl_bench.strategies.lowrank.o_lora import OLoRA
from cl_bench.strategies.lowrank.seq_lora import SeqLoRA
from cl_bench.strategies.merging.task_vector import TaskVector
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.adam_nscl import AdamNSCL
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.projection.rogo import ROGO
from cl_bench.strategies.projection.sgp import SGP
from cl_bench.strategies.projection.trgp import TRGP
from cl_bench.strategies.replay.er import ER
from cl_bench.strategies.svd.adaptive_svd import AdaptiveSVD
from cl_bench.subspace import own_rows

BATCH, SAMPLES, EPOCHS = 8, 75, 5  # ten steps an epoch, the last with three samples

sgd = functools.partial(SGD, lr=0.05)
momentum = functools.partial(SGD, lr=0.02, momentum=0.9, weight_decay=1e-3)
adam = functools.partial(Adam, lr=3e-3)
few = {"samples": 21}
words = functools.partial(AdaptiveSVD, exclude=("*relative*",))
CASES: dict = {
    "finetune": (Finetune, sgd, {}),
    "finetune-batch_norm": (Finetune, momentum, {"batch_norm": True}),
    "gpm-batch_norm": (functools.partial(GPM, 0.9, **few), sgd, {"batch_norm": True}),
    "finetune-clipped": (Finetune, momentum, {"gradient_clip_val": 0.5}),
    "joint": (Joint, sgd, {}),
    "ewc": (functools.partial(EWC, 5.0, **few), sgd, {}),
    "ewc-adam": (functools.partial(EWC, 5.0, fisher="empirical", **few), adam, {}),
    "ewc-t5": (functools.partial(EWC, 5.0, samples=9), momentum, {"family": "t5"}),
    "er": (functools.partial(ER, 20), sgd, {}),
    "freeze": (functools.partial(Freeze, n_blocks=1), momentum, {}),
    "task_vector": (functools.partial(TaskVector, alpha=0.5), sgd, {}),
    "gpm": (functools.partial(GPM, 0.9, **few), sgd, {}),
    "gpm-adam": (functools.partial(GPM, 0.9, **few), adam, {}),
    "gpm-by-layer": (functools.partial(GPM, 0.9, samples=[7, 21, 3]), sgd, {}),
    "sgp": (functools.partial(SGP, threshold=0.9, **few), sgd, {}),
    "trgp": (
        functools.partial(TRGP, threshold=0.8, trust=0.1, **few),
        momentum,
        {"scenario": "task"},
    ),
    "rogo": (functools.partial(ROGO, threshold=0.97, cosine=0.5, strength=0.1, **few), sgd, {}),
    "rogo-adam": (
        functools.partial(ROGO, threshold=0.97, cosine=0.5, strength=0.1, **few),
        adam,
        {},
    ),
    "adam_nscl": (functools.partial(AdamNSCL, 50.0), adam, {}),
    "adaptive_svd": (AdaptiveSVD, adam, {}),
    "adaptive_svd-dense": (
        functools.partial(AdaptiveSVD, parametrisation="dense_projected"),
        adam,
        {},
    ),
    "adaptive_svd-factored": (
        functools.partial(AdaptiveSVD, parametrisation="factored"),
        sgd,
        {},
    ),
    "o_lora": (functools.partial(OLoRA, rank=2, dropout=0.0, targets="all"), adam, {}),
    "inc_lora": (functools.partial(IncLoRA, rank=2, dropout=0.0, targets="all"), adam, {}),
    "seq_lora": (functools.partial(SeqLoRA, rank=2, dropout=0.0, targets="all"), adam, {}),
    "gpm+er": (lambda: Together({"gpm": GPM(0.9, **few), "er": ER(20)}), sgd, {}),
    "gpm-t5": (functools.partial(GPM, 0.7, samples=9), adam, {"family": "t5"}),
    "gpm-gpt2": (functools.partial(GPM, 0.7, samples=9), momentum, {"family": "gpt2"}),
    "rogo-t5": (
        functools.partial(ROGO, threshold=0.7, cosine=0.5, strength=0.1, samples=9),
        adam,
        {"family": "t5"},
    ),
    "adaptive_svd-t5": (words, adam, {"family": "t5"}),
    "adaptive_svd-gpt2": (words, adam, {"family": "gpt2"}),
    "adaptive_svd-llama": (words, adam, {"family": "llama", "gradient_clip_val": 0.3}),
    "adaptive_svd-qwen3_moe": (words, adam, {"family": "qwen3_moe"}),
    "gpm-qwen3_moe": (functools.partial(GPM, 0.7, samples=9), adam, {"family": "qwen3_moe"}),
    "adaptive_svd-clipped": (
        functools.partial(AdaptiveSVD, projection="left"),
        adam,
        {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2},
    ),
    "o_lora-t5": (functools.partial(OLoRA, rank=2, dropout=0.0), adam, {"family": "t5"}),
    "o_lora-gpt2": (functools.partial(OLoRA, rank=2, dropout=0.0), adam, {"family": "gpt2"}),
    "accumulated": (functools.partial(GPM, 0.9, **few), sgd, {"accumulate_grad_batches": 2}),
}

FAMILIES = ("t5", "gpt2", "llama", "qwen3_moe")
ON_TEXT: dict = {
    "gpm": (functools.partial(GPM, 0.7, samples=9), adam),
    "rogo": (
        functools.partial(ROGO, threshold=0.7, cosine=0.5, strength=0.1, samples=9),
        adam,
    ),
    "o_lora": (functools.partial(OLoRA, rank=2, dropout=0.0), adam),
    "adaptive_svd": (words, adam),
    "adaptive_svd-dense": (functools.partial(words, parametrisation="dense_projected"), adam),
    "adaptive_svd-factored": (functools.partial(words, parametrisation="factored"), sgd),
}
LANGUAGE: dict = {
    f"{name}-on-{family}": (make, optimizer, {"family": family})
    for (name, (make, optimizer)), family in itertools.product(ON_TEXT.items(), FAMILIES)
}
"""Every one of these on every kind of language model: minutes."""
MORE = {
    "colour": [("coal", "black"), ("a lemon", "yellow")],
    "size": [("a mouse", "small"), ("the moon", "large")],
}
"""Texts enough for four processes to score; of a batch of three samples one gets none."""
queries = functools.partial(OLoRA, rank=2, dropout=0.0, targets=["q_proj", "v_proj"])
LANGUAGE["o_lora-on-qwen3_moe"] = (queries, adam, {"family": "qwen3_moe"})

INTERRUPTED = (
    *("gpm-adam", "rogo-adam", "o_lora", "task_vector", "ewc-adam"),
    *("adaptive_svd", "adaptive_svd-dense", "adaptive_svd-factored", "finetune-clipped"),
)
MOMENTS = range(4, 100, 10)
"""Batches of a hundred before which a run dies: within epochs, tasks, and between them."""
WAITING = 64
"""That before which a run dies that other processes go on with."""


class Killed(BaseException):
    """The process is gone."""


def die_before(learner, batch):
    """Let the learner's process end before it learns so many batches and one."""
    learn, seen = learner._learn, itertools.count()

    def until(given):
        if next(seen) == batch:
            raise Killed
        return learn(given)

    learner._learn = until


def run(name, directory, samples=SAMPLES, batch=BATCH, dtype=torch.float64, seed=0, **more):
    """Learn two tasks; returns what must not depend on the number of processes."""
    make, optimizer, options = (CASES | LANGUAGE)[name]
    options = {**options, **more}
    every, dies, resume = (options.pop(k, None) for k in ("every_steps", "dies", "resume"))
    sharded, accelerator = options.pop("sharded", False), options.pop("accelerator", "cpu")
    family = options.pop("family", None)
    if family:
        batch //= 2  # what is left over then is a single sample
        texts = {k: [*rows, *MORE[k]] for k, rows in TEXTS.items()} if name in LANGUAGE else TEXTS
        stream = make_texts(texts=texts)
        thrifty = options.pop("gradient_checkpointing", False)
        learner = make_text_learner(
            family, stream, optimizer=optimizer, gradient_checkpointing=thrifty
        )
        learner.batch_size = batch
    else:
        stream = make_stream(options.pop("scenario", "domain"), tasks=2, n=samples, seed=seed)
        for task in stream:
            task.data.tensors["x"] = task.data.tensors["x"].to(dtype)
        network = mlp(bias=True)
        if options.pop("batch_norm", False):
            torch.manual_seed(1)
            first, second = nn.Linear(DIM, WIDTH), nn.Linear(WIDTH, WIDTH)
            network = nn.Sequential(first, nn.BatchNorm1d(WIDTH), nn.ReLU(), second, nn.ReLU())
        learner = Classifier(stream, network, optimizer, batch, seed)
    learner.to(dtype)
    learner.remember_initial_state()
    if dies is not None:
        die_before(learner, dies)
    strategy = make()

    def trainer(**more):
        several = ModelParallelStrategy() if sharded else "ddp"  # an object serves one Trainer
        return Trainer(
            accelerator=accelerator,
            strategy=several if world() > 1 else "auto",
            devices=world(),
            max_epochs=EPOCHS,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
            **more,
        )

    conducting = sys.modules["cl_bench.experiment.conduct"]
    with mock.patch.object(conducting, "write_figures", return_value=[]):
        result = conduct(
            stream,
            strategy,
            learner,
            trainer,
            Identity("toy", name, "seed: 0\n", "python -m cl_bench"),
            loop=LoopSettings(seed, batch),
            evaluation=EvalSettings(),
            alignment=AlignmentSettings(samples=20, batches=2),
            checkpoint=CheckpointSettings(every_steps=every),
            run_dir=directory,
            resume=bool(resume),
            sharded=sharded,
        )
    held = sum(own_rows(p.detach()).numel() for p in learner.parameters())
    bases = strategy.memory if isinstance(strategy, GPM) else {}
    learner.eval()
    with torch.no_grad(), learner.put_together():
        known = [t if learner.task_id_at_test else None for t in stream]
        predictions = []
        for task, told in zip(stream, known, strict=True):
            with strategy.inference(learner, told):
                everything = task.train[torch.arange(len(task.train))]
                predictions.append(learner(everything).argmax(-1))
    return {
        "weights": {k: v.detach().clone() for k, v in learner.weights().items()},
        "bases": {k: v @ v.t() for k, v in bases.items()},
        "predictions": predictions,
        "matrix": torch.from_numpy(result.matrix),
        "world": world(),
        "held": held,
        "relaxed": sum(q for q, _ in strategy.turned.values()) if isinstance(strategy, ROGO) else 0,
        "steps": result.summary["optimizer_steps"],
    }


SHARDABLE = [name for name, (make, _, _) in CASES.items() if make().needs.shardable]


SINGLE, SEEDS = ("gpm", "er"), (0, 1, 2)


def single(seed):
    """Options of a run in single precision."""
    return {"dtype": torch.float32, "seed": seed}


def cut_short(name, directory, batch):
    """A run that dies before so many batches and one; its checkpoints are seven steps apart."""
    try:
        run(name, directory, sharded=True, every_steps=7, dies=batch)
    except Killed:
        return
    raise AssertionError(f"{name} was over before batch {batch}")


def goes_on(name, directory):
    return run(name, directory, sharded=True, every_steps=7, resume=True)


def equal_steps(directory, precision):
    """What is kept of runs of two tasks, by trainer."""
    for kind in ("ddp", "fsdp"):
        if precision == "double":
            names = CASES if kind == "ddp" else SHARDABLE
            wanted = [(name, name, {}) for name in names]
        else:
            wanted = [(f"{n}{s}", n, single(s)) for n, s in itertools.product(SINGLE, SEEDS)]
        for place, name, options in wanted:
            found = run(name, directory / f"{place}-{kind}", sharded=kind == "fsdp", **options)
            torch.save(found, directory / f"{place}-{kind}-rank{rank()}.pt")
    if precision == "double":
        cut_short("adaptive_svd", directory / "cut", 64)
        found = goes_on("adaptive_svd", directory / "cut")
        torch.save(found, directory / f"cut-rank{rank()}.pt")


def on_language(directory):
    """Every method on every kind of language model, weights shared out."""
    for name in LANGUAGE:
        found = run(name, directory / f"{name}-fsdp", sharded=True)
        torch.save(found, directory / f"{name}-fsdp-rank{rank()}.pt")


def interrupted(directory):
    """Runs that are never disturbed, that die and go on, and that die and wait for others."""
    for name in INTERRUPTED:
        found = run(name, directory / f"{name}-whole", sharded=True, every_steps=7)
        torch.save(found, directory / f"{name}-whole-rank{rank()}.pt")
        for moment in MOMENTS:
            cut_short(name, directory / f"{name}-{moment}", moment)
            if moment == WAITING:
                cut_short(name, directory / f"{name}-waiting", moment)
            found = goes_on(name, directory / f"{name}-{moment}")
            torch.save(found, directory / f"{name}-{moment}-rank{rank()}.pt")


def go_on(directory):
    """What others have begun."""
    for name in INTERRUPTED:
        found = goes_on(name, directory / f"{name}-waiting")
        torch.save(found, directory / f"{name}-waiting-rank{rank()}.pt")


def main(directory, what):
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    {
        "double": functools.partial(equal_steps, precision="double"),
        "single": functools.partial(equal_steps, precision="single"),
        "language": on_language,
        "interrupted": interrupted,
        "go_on": go_on,
    }[what](directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
