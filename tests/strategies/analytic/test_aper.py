"""APER: class means in the features of two networks, and the cosine head that tunes one."""

import functools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from closed import double, learned, union
from torch.optim import SGD
from toys import make_learner, make_stream, mlp

from cl_bench.contracts import UsageError
from cl_bench.learners import Classifier
from cl_bench.models import Identity
from cl_bench.strategies.analytic.aper import APER
from cl_bench.strategies.analytic.ncm import NCM


def test_a_copy_that_learned_nothing_gives_the_class_means_logits():
    """cos([f, f], [m, m]) = cos(f, m)."""
    stream = double(make_stream("class"))
    still = functools.partial(SGD, lr=0.0)
    learner, aper, _ = learned(stream, APER(), optimizer=still, dtype=torch.float64)
    ncm = learned(stream, NCM(), dtype=torch.float64)[1]
    batch = union(stream)
    with torch.no_grad():
        torch.testing.assert_close(
            aper.predict(learner, batch, None), ncm.predict(learner, batch, None)
        )


@pytest.mark.parametrize("scenario", ["class", "domain", "task"])
def test_features_are_those_before_and_after_the_first_task(scenario):
    stream = double(make_stream(scenario))
    learner, aper, engine = learned(stream, APER(), epochs=3, dtype=torch.float64)
    begun = make_learner(stream).to(torch.float64).eval()
    tuned = learned(stream, APER(), order=[0], epochs=3, dtype=torch.float64)[0]
    batch = union(stream)
    with torch.no_grad():
        before, after = (net.backbone(batch["x"]) for net in (begun, tuned))
        assert not torch.allclose(before, after)
        f = torch.cat([before, after], dim=1)
        torch.testing.assert_close(aper.read(learner, batch), f)
        means = torch.stack([f[batch["y"] == c].mean(0) for c in batch["y"].unique()])
        wanted = F.normalize(f, dim=1) @ F.normalize(means, dim=1).t()
        torch.testing.assert_close(aper.predict(learner, batch, None), wanted)
    assert not learner.extras(aper)
    assert min(engine.evaluate(list(stream), 100, None).values()) > 0.4


def test_the_first_task_is_learned_with_cosines():
    stream = make_stream("class")
    learner = Classifier(stream, mlp(), functools.partial(SGD, lr=0.1), 10, 0, head_bias=True)
    strategy = APER()
    learner.begin(stream[0], strategy)
    torch.nn.init.normal_(learner.heads[0].bias)
    scale = learner.extras(strategy)["scale"].factor
    assert scale.item() == 1.0
    with torch.no_grad():
        scale.fill_(3.0)
    batch = stream[0].everything
    loss = strategy.objective(learner, batch, learner(batch))
    f, w = learner.features(batch), learner.heads[0].weight
    cosines = F.cosine_similarity(f[:, None], w[None], dim=2)
    torch.testing.assert_close(loss.mean.float(), F.cross_entropy(3 * cosines, batch["y"]))
    loss.mean.backward()
    for tuned in (scale, w, next(learner.backbone.parameters())):
        assert tuned.grad.abs().sum() > 0


def test_a_network_without_layers_of_its_own_is_refused():
    with pytest.raises(UsageError, match=r"nothing but heads to train"):
        learned(make_stream("class"), APER(), model=Identity())
