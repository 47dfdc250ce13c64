"""Requests to forget on the tiny biographies: forgotten, kept, back after 50 steps.

    python tests/benchmarks/unlearning.py build/unlearning.jsonl --seeds 1 2 3

For every seed the model is pre-trained (or taken from the cache) and taught task 0 once; from those
weights each method meets the three requests. A line for each method is added to the file; those
that are there are not run again.
"""

import argparse
import copy
import functools
import json
import time
from pathlib import Path

import torch
from hydra.utils import instantiate
from lightning import Trainer
from omegaconf import OmegaConf

from cl_bench.cli.folders import conf_directory
from cl_bench.cli.optimizers import build_optimizer
from cl_bench.contracts import derive_seed
from cl_bench.experiment import LightningEngine, LoopSettings, pretrain, seed_training
from cl_bench.experiment.probes.clock import Clock
from cl_bench.experiment.probes.recovery import RecoveryProbe, RecoverySettings
from cl_bench.experiment.probes.untouched import measure
from cl_bench.learners import Causal
from cl_bench.strategies.unlearning.gradient_ascent import GradientAscent
from cl_bench.strategies.unlearning.o3 import O3
from cl_bench.strategies.unlearning.relabel import Relabel

METHODS = {
    "gradient_ascent": (GradientAscent, 0.1),
    "relabel": (Relabel, 0.1),
    "o3": (functools.partial(O3, targets="all"), 3.0),
    "o3, gate open": (functools.partial(O3, targets="all", gate="open"), 3.0),
    "o3, rate of the others": (functools.partial(O3, targets="all"), 0.1),
}
"""What meets a request, at how many times the optimizer's rate: a new adapter takes larger steps
than whole weights do. O3's was chosen on seed 1 of 3 and 10, the others' is the stream's."""


class Silent:
    """Keeps and shows nothing."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def quiet(**options):
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


def people(steps, rate):
    """The stream of ``+stream=biography/unlearn``, at a rate for requests."""
    cfg = OmegaConf.load(conf_directory() / "stream/biography/unlearn.yaml")
    if steps:
        cfg.stream.pretrain.steps = steps
    cfg.stream.forget_rate = rate
    return instantiate(cfg.stream, _convert_="all", task_id_at_test=True), cfg.batch_size


def made(seed, steps):
    """Stream, learner and how it is pre-trained, as ``+stream=biography/unlearn`` has them."""
    conf = conf_directory()
    stream, batch_size = people(steps, 0.1)
    seed_training(derive_seed(seed, "model"))
    model = OmegaConf.load(conf / "model/gpt_tiny.yaml")
    network = instantiate(model, vocabulary=sum(stream.heads), _convert_="all")
    factory = build_optimizer(OmegaConf.load(conf / "optimizer/adamw.yaml")).factory
    return stream, Causal(stream, network, factory, batch_size, seed)


def engine_of(learner, strategy, seed):
    return LightningEngine(
        learner, strategy, quiet, LoopSettings(seed, 48), None, Silent(), Silent()
    )


def scores(learner, stream):
    """Exact match on requests, on task 0's held-out people, on those beside the requests."""
    read, *requests = stream
    found = {
        "utility": measure(learner, read, read.test, 400, None)[0],
        "neighbours": measure(learner, read, read.probes["neighbours"], 400, None)[0],
    }
    named = [measure(learner, one, one.test, 400, None)[0] for one in requests]
    told = [measure(learner, one, one.probes["biography"], 400, None)[0] for one in requests]
    return {**found, "forget": named, "biography": told}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=0, help="of pre-training; 0: the stream's")
    given = parser.parse_args()
    torch.set_num_threads(1)
    done = set()
    if given.file.exists():
        done = {tuple(json.loads(line)["key"]) for line in given.file.read_text().splitlines()}
    for seed in given.seeds:
        left = [name for name in METHODS if (name, seed) not in done]
        if not left:
            continue
        stream, learner = made(seed, given.steps)
        began = time.process_time()
        pretrain(learner, stream.pretraining, quiet, seed, Silent())
        taught = GradientAscent()
        engine_of(learner, taught, seed).learn(stream[0], taught.plan(stream, 0))
        before, start = scores(learner, stream), copy.deepcopy(learner.weights())
        print(seed, "taught", before, f"{time.process_time() - began:.0f} s", flush=True)
        for name in left:
            began = time.process_time()
            strategy, rate = METHODS[name][0](), METHODS[name][1]
            learner.load_weights(start)
            stream, _ = people(given.steps, rate)
            engine, after = engine_of(learner, strategy, seed), []
            for t in range(1, len(stream)):
                engine.learn(stream[t], strategy.plan(stream, t))
                after.append(scores(learner, stream))
            probe = RecoveryProbe(
                RecoverySettings(enabled=True, steps=50, rate=0.2), 48, 400, stream, Silent(),
                Clock(), seed,
            )  # fmt: skip
            back = [probe._take_apart(learner, one, one.recovery) for one in stream.tasks[1:]]
            row = {
                "key": [name, seed],
                "before": before,
                "after": after,
                "recovery": back,
                "cpu_seconds": time.process_time() - began,
            }
            with given.file.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row["key"], after[-1], [b["recovered"] for b in back], flush=True)


if __name__ == "__main__":
    main()
