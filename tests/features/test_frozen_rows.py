"""Closed-form heads on features of real data, against bare numpy on all samples at once.

Skipped where data (``CL_BENCH_TEST_DATA``), weights (``make backbones``) or cached features
(``CL_BENCH_CACHE``) are not at hand: features=only with the experiment makes the latter.
"""

import numpy as np
import pytest
import torch
from conftest import DATA_AT_HAND
from toys import make_engine, make_learner

from cl_bench.cli.build import build_backbone, build_strategy, build_stream
from cl_bench.cli.compose import composed
from cl_bench.contracts import UsageError
from cl_bench.features import Backbone, FeatureStream
from cl_bench.models import Identity

pytestmark = pytest.mark.slow

ROWS = {
    "frozen_cifar100": ("cifar100", {"ncm": (56.4, 2.0), "ranpac": (65.2, 2.0)}),
    "frozen_ag_news": ("cl_benchmark", {}),
    "frozen_dbpedia": ("cl_benchmark", {}),
}
"""Folder of the data, and what was measured by other code on it: accuracy, and how near is near."""


def parts(experiment, strategy, monkeypatch):
    """The experiment's stream of features, and the strategy, as the command line makes them."""

    def absent(*_):
        pytest.skip(f"no cached features of {experiment}: see the head of this file")

    monkeypatch.setattr(Backbone, "features", absent)
    data = DATA_AT_HAND / ROWS[experiment][0]
    if not data.is_dir():
        pytest.skip(f"no data in {data}")
    words = [f"+experiment={experiment}", f"stream.data_dir={data}", f"strategy={strategy}"]
    cfg, _ = composed(words)
    made, _ = build_strategy(cfg, strategy, None)
    try:
        backbone = build_backbone(cfg.backbone)
    except UsageError as error:
        pytest.skip(str(error))
    return FeatureStream(build_stream(cfg.stream, made), backbone, lambda line: None), made


def arrays(stream, side):
    found = [getattr(task, side)[torch.arange(len(getattr(task, side)))] for task in stream]
    return (torch.cat([b[k] for b in found]).numpy() for k in ("x", "y"))


def class_means(train, test):
    (X, y), (E, z) = train, test
    means = np.stack([X[y == c].mean(0, dtype=float) for c in range(y.max() + 1)])
    cosines = (E @ means.T) / np.linalg.norm(means, axis=1)
    return 100 * np.mean(cosines.argmax(1) == z)


def ridge(train, test, R):
    """Of all strengths the best on another fifth than the strategy's."""
    (X, y), (E, z) = train, test
    H, Y = np.maximum(X @ R, 0).astype(float), np.eye(y.max() + 1)[y]
    held = np.random.default_rng(0).random(len(y)) < 0.2
    G, Q, eye = H[~held].T @ H[~held], H[~held].T @ Y[~held], np.eye(H.shape[1])
    errors = {}
    for strength in 10.0 ** np.arange(-2, 9):  # those below differ in nothing
        W = np.linalg.solve(G + strength * eye, Q)
        errors[strength] = np.mean((H[held] @ W - Y[held]) ** 2)
    best = min(errors, key=errors.get)
    W = np.linalg.solve(G + H[held].T @ H[held] + best * eye, H.T @ Y)
    return 100 * np.mean((np.maximum(E @ R, 0) @ W).argmax(1) == z)


@pytest.mark.parametrize("experiment", ROWS)
@pytest.mark.parametrize("name", ["ncm", "ranpac"])
def test_task_by_task_it_scores_what_numpy_does_at_once(experiment, name, monkeypatch):
    stream, strategy = parts(experiment, name, monkeypatch)
    learner = make_learner(stream, Identity(), batch_size=64)
    strategy.check(learner)
    engine = make_engine(learner, strategy, batch_size=64)
    for t, task in enumerate(stream):
        engine.learn(task, strategy.plan(stream, t))
    train, test = (tuple(arrays(stream, side)) for side in ("train", "test"))
    scores = engine.evaluate(list(stream), 2000, None)
    sizes = {task.name: len(task.test) for task in stream}
    found = 100 * sum(scores[n] * sizes[n] for n in sizes) / len(test[1])
    if name == "ncm":
        wanted = class_means(train, test)
    else:
        wanted = ridge(train, test, strategy._projection.numpy())
    print(f"{experiment} {name}: {found:.2f}, numpy {wanted:.2f}")
    assert found == pytest.approx(wanted, abs=0.2)
    if name in ROWS[experiment][1]:
        bar, near = ROWS[experiment][1][name]
        assert found == pytest.approx(bar, abs=near)
