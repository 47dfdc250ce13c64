"""Learners that observe against river's, test-then-train: accuracy and samples a second.

    python tests/benchmarks/streaming.py build/streaming.jsonl

Every stream of ``stream=drift`` with every learner and seed, one sample after another, the first
``warmup`` learned before any is answered. A line for each is added to the file; those that are
there are not run again. Ours are run by the engine, with all that surrounds it.
"""

import argparse
import functools
import json
import time
from pathlib import Path

import torch
from torch.optim import SGD

from cl_bench.experiment import LoopSettings
from cl_bench.learners import Classifier
from cl_bench.metrics.prequential import Prequential
from cl_bench.models import MLP, Identity
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.replay.er import ER
from cl_bench.strategies.streaming.figmn import FIGMN
from cl_bench.strategies.streaming.lite_rvfl import LiteRVFL
from cl_bench.strategies.streaming.random_feature_owm import RandomFeatureOWM
from cl_bench.streaming import Streaming, StreamingEngine
from cl_bench.tasks.drift import SETS, Drift

WARMUP = 200
STREAMS = ("sea", "sine", "hyperplane", "rbf", "phishing", "bananas")
OURS = {
    "lite_rvfl": LiteRVFL,
    "figmn": FIGMN,
    "random_feature_owm": RandomFeatureOWM,
    "finetune": Finetune,
    "er": functools.partial(ER, memory=200, replay=4),
}
RIVER = ("logistic_regression", "hoeffding_adaptive_tree", "adaptive_random_forest")


class Silent:
    """Keeps and shows nothing."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def stream(name, seed, samples):
    tasks = 4 if name in ("sea", "sine") else 1
    return Drift(name, tasks, samples // tasks, 50, seed=seed)


def ours(name, made, seed):
    """Prequential accuracy, and seconds of answering and learning."""
    strategy = OURS[name]()
    torch.manual_seed(seed)
    width = made.input_shape
    network = MLP(width, (50,), True) if name in ("finetune", "er") else Identity()
    learner = Classifier(made, network, functools.partial(SGD, lr=0.05), 1, seed, head_bias=True)
    engine = StreamingEngine(
        learner, strategy, None, LoopSettings(seed, 1), None, Silent(), Silent(),
        streaming=Streaming(warmup=WARMUP),
    )  # fmt: skip
    for t, task in enumerate(made):
        engine.learn(task, strategy.plan(made, t))
    return engine.prequential, sum(engine.seconds.values())


def rivers(name, made, seed):
    """The same of one of river's."""
    from river import forest, linear_model, preprocessing, tree

    classes = len(made[0].classes)
    linear = linear_model.LogisticRegression() if classes == 2 else linear_model.SoftmaxRegression()
    model = {
        "logistic_regression": lambda: preprocessing.StandardScaler() | linear,
        "hoeffding_adaptive_tree": lambda: tree.HoeffdingAdaptiveTreeClassifier(seed=seed),
        "adaptive_random_forest": lambda: forest.ARFClassifier(seed=seed),
    }[name]()
    prequential, seconds, warm = Prequential(), 0.0, WARMUP
    for task in made:
        data = task.train[torch.arange(len(task.train))]
        for x, label in zip(data["x"].tolist(), data["y"].tolist(), strict=True):
            features = dict(enumerate(x))
            began = time.perf_counter()
            answer = model.predict_one(features)
            model.learn_one(features, label)
            seconds += time.perf_counter() - began
            warm -= 1
            if warm < 0:
                prequential.add(torch.tensor([float(answer == label)]), torch.tensor([label]))
    return prequential, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--samples", type=int, default=10000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    done = set()
    if given.file.exists():
        done = {tuple(json.loads(line)["key"]) for line in given.file.read_text().splitlines()}
    for seed in given.seeds:
        for which in STREAMS:
            if which in SETS and seed != given.seeds[0]:
                continue  # a set is in one order
            made = None
            for name in (*OURS, *RIVER):
                if (which, name, seed) in done:
                    continue
                made = made or stream(which, seed, given.samples)
                cpu = time.process_time()
                run = ours if name in OURS else rivers
                found, seconds = run(name, made, seed)
                row = {
                    "key": [which, name, seed],
                    "samples": len(found),
                    **found.values(),
                    "seconds": seconds,
                    "cpu_seconds": time.process_time() - cpu,
                }
                with given.file.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)


if __name__ == "__main__":
    main()
