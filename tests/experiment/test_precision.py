"""Half precision, clipping, accumulation and activation checkpointing, under every strategy."""

import pytest
import torch
from together import CASES, run
from toys import accuracy, make_engine, make_learner, make_stream, mlp, weights

from cl_bench.strategies.projection.gpm import GPM

TEXT = [
    *("finetune", "joint", "ewc", "er", "freeze", "task_vector"),
    *("gpm", "sgp", "rogo", "adam_nscl", "adaptive_svd", "o_lora"),
]
IMAGE = [name for name, (_, _, options) in CASES.items() if not options or "scenario" in options]


@pytest.mark.parametrize("name", TEXT)
def test_activations_that_are_computed_again_change_nothing(name, tmp_path):
    kept = run(name, tmp_path / "kept", family="t5")
    again = run(name, tmp_path / "again", family="t5", gradient_checkpointing=True)
    for key, weight in kept["weights"].items():
        torch.testing.assert_close(again["weights"][key], weight, rtol=1e-9, atol=1e-12)
    for key, projector in kept["bases"].items():
        torch.testing.assert_close(again["bases"][key], projector, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", IMAGE)
def test_half_precision_clipped_and_accumulated(name):
    make, optimizer, options = CASES[name]
    stream = make_stream(options.get("scenario", "domain"), tasks=2)
    learner, strategy = make_learner(stream, mlp(bias=True), optimizer), make()
    engine = make_engine(
        learner,
        strategy,
        epochs=20,
        precision="bf16-mixed",
        gradient_clip_val=0.5,
        accumulate_grad_batches=2,
    )
    engine.learn(stream[0], strategy.plan(stream, 0))
    before = weights(learner)
    remembered = dict(strategy.memory) if isinstance(strategy, GPM) else {}
    engine.learn(stream[1], strategy.plan(stream, 1))
    after = weights(learner)
    assert all(w.dtype == torch.float32 and bool(w.isfinite().all()) for w in after.values())
    with strategy.inference(learner, stream[1]):
        assert accuracy(learner, stream[1]) > 0.5
    for layer, M in remembered.items():
        assert M.dtype in (torch.float32, torch.float64)
        torch.testing.assert_close(M.t() @ M, torch.eye(M.shape[1]).to(M), atol=1e-5, rtol=0)
        if name.startswith("gpm"):
            change = after[f"{layer}.weight"] - before[f"{layer}.weight"]
            d = change.shape[1]  # with a bias the last input is the constant 1
            if len(M) > d:
                bias = after[f"{layer}.bias"] - before[f"{layer}.bias"]
                change = torch.cat([change, bias[:, None]], dim=1)
            assert float(change.norm()) > 1e-4
            assert float((change @ M.to(change)).norm() / change.norm()) < 1e-5
