"""APER with adapters: class means in features without and with what the first task has learned."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from transformers_small import double, learned, make_learner, union

from cl_bench.adapters import Adapter, Spectral
from cl_bench.contracts import UsageError
from cl_bench.experiment import Together
from cl_bench.strategies.analytic.aper import APER
from cl_bench.strategies.analytic.ncm import NCM
from cl_bench.strategies.blocks.aper_adapter import APERAdapter


@torch.no_grad()
def test_adapters_that_learned_nothing_give_the_class_means_logits():
    strategy, ncm = APERAdapter(r=2), NCM()
    learner, stream = learned(strategy, rate=0.0)
    plain, _ = learned(ncm, rate=0.0, epochs=0, stream=double())
    batch = union(stream)
    torch.testing.assert_close(
        strategy.predict(learner, batch, None), ncm.predict(plain, batch, None)
    )


@torch.no_grad()
def test_features_are_those_of_the_first_network_and_of_what_the_first_task_made_of_it():
    strategy, seen = APERAdapter(r=2), []
    batch = union(double())

    def after(learner, stream, t):
        own = learner.extras(strategy)["adapters"]
        seen.append((strategy.read(learner, batch), [p.clone() for p in own.parameters()]))

    learner, _ = learned(strategy, after=after, epochs=2)
    begun = make_learner(double()).eval()
    f, width = seen[0][0], seen[0][0].shape[1] // 2
    assert torch.equal(f[:, :width], begun.features(batch))
    assert not torch.allclose(f[:, width:], f[:, :width])
    for later, adapters in seen[1:]:
        assert torch.equal(later, f), "later tasks learn nothing"
        assert all(torch.equal(p, q) for p, q in zip(adapters, seen[0][1], strict=True))
    means = torch.stack([f[batch["y"] == c].mean(0) for c in range(9)])
    wanted = F.normalize(f, dim=1) @ F.normalize(means, dim=1).T
    torch.testing.assert_close(strategy.predict(learner, batch, None), wanted)


def test_adapters_of_others_are_refused_where_whole_networks_are_kept_by_name():
    adapter = Adapter(Spectral())
    for strategy in (APER(), APERAdapter()):
        with pytest.raises(UsageError, match="leave one of them out"):
            Together({"lora": adapter, "aper": strategy})
