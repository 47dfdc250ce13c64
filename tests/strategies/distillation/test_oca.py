"""OCA: its loss by hand, Q that preserves cosines, and galleries that stay of use."""

import functools
import sys

import torch
import torch.nn.functional as F  # noqa: N812
from lightning import Trainer
from toys import learn, make_learner, make_stream

from cl_bench.experiment import (
    AlignmentSettings,
    CheckpointSettings,
    EvalSettings,
    Identity,
    LoopSettings,
    ProbeSettings,
    conduct,
)
from cl_bench.experiment.probes.compatibility import CompatibilitySettings
from cl_bench.strategies.distillation.oca import OCA


def test_the_loss_is_its_formula_and_q_keeps_cosines():
    stream = make_stream("class", tasks=2)
    learner, strategy = make_learner(stream), OCA()
    learn(learner, strategy, stream[0], epochs=2)
    old = F.normalize(learner.features(stream[1].everything)[:, :19], dim=1).detach()
    learner.begin(stream[1], strategy)
    learner.train()
    batch = stream[1].everything
    h, y = learner.features(batch), batch["y"]
    Q = learner.extras(strategy)["rotation"].weight
    torch.testing.assert_close(Q @ Q.t(), torch.eye(24), atol=1e-5, rtol=0)
    assert float((Q - torch.eye(24)).abs().max()) > 1e-4  # it has been learned
    P = torch.stack([old[y == c].mean(0) for c in range(3, 6)])
    b = F.normalize(h[:, :19], dim=1)
    wanted = (
        5 * F.cross_entropy(learner.readout(h @ Q.t()), y, label_smoothing=0.1)
        + 10 * F.cross_entropy(b @ P.t(), y - 3, label_smoothing=0.1)
        + 5 * (1 - F.cosine_similarity(b, P[y - 3])).mean()
    )
    found = strategy.objective(learner, batch, learner(batch)).mean
    torch.testing.assert_close(found.float(), wanted)


def test_the_probe_records_every_pair_of_models(tmp_path, monkeypatch):
    module = sys.modules["cl_bench.experiment.conduct"]
    for name in ("write_figures", "write_probe_figures"):
        monkeypatch.setattr(module, name, lambda directory: [])
    monkeypatch.setattr(module, "print_run", lambda directory, console: None)
    from cl_bench.tracking import Record

    told = []
    monkeypatch.setattr(
        Record, "probe", lambda self, name, task, values, **more: told.append((name, task, values))
    )
    stream = make_stream("class", tasks=3)
    trainer = functools.partial(
        Trainer, accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    conduct(
        stream,
        OCA(),
        make_learner(stream),
        trainer,
        Identity("toy", "oca", "seed: 0\n", "python -m cl_bench"),
        loop=LoopSettings(0, 10),
        evaluation=EvalSettings(),
        alignment=AlignmentSettings(enabled=False),
        probe=ProbeSettings(compatibility=CompatibilitySettings(enabled=True, samples=20)),
        checkpoint=CheckpointSettings(enabled=False),
        run_dir=tmp_path / "run",
    )
    rows = [values["cmc1"]["row"] for name, _, values in told if name == "compatibility"]
    assert [len(row) for row in rows] == [1, 2, 3]
    assert all(0 <= value <= 1 for row in rows for value in row)
    last = told[-2][2] if told[-2][0] == "compatibility" else told[-1][2]
    assert 0 <= last["map"]["multi_model"] <= 1
