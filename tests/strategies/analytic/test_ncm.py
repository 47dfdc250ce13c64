"""Nearest class mean: no training, exact sums."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from toys import make_engine, make_learner, make_stream

from cl_bench.contracts import UsageError
from cl_bench.experiment import Together, check_pair
from cl_bench.strategies.analytic.ncm import NCM
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.baselines.joint import Joint


def learned(stream, strategy=None, order=None, batch_size=10, **options):
    strategy = strategy or NCM()
    learner = make_learner(stream, batch_size=batch_size).to(options.pop("dtype", torch.float32))
    engine = make_engine(learner, strategy, batch_size=batch_size, **options)
    for t in order or range(len(stream)):
        engine.learn(stream[t], strategy.plan(stream, t))
    return learner, strategy, engine


def test_nothing_is_trained_and_every_task_is_scored():
    stream = make_stream("class")
    before = {k: v.clone() for k, v in make_learner(stream).weights().items()}
    learner, _, engine = learned(stream)
    assert all(torch.equal(v, before[k]) for k, v in learner.weights().items())
    scores = engine.evaluate(list(stream), 100, None)
    other = learned(stream, Finetune(), epochs=5)[2]
    assert min(scores.values()) > 0.5
    assert sum(scores.values()) > sum(other.evaluate(list(stream), 100, None).values())


@pytest.mark.parametrize("scenario", ["domain", "task", "class"])
def test_the_mean_is_that_of_all_samples(scenario):
    """Against features at once; over domains a class's samples are pooled."""
    stream = make_stream(scenario)
    learner, strategy, _ = learned(stream, dtype=torch.float64)
    x = torch.cat([task.everything["x"] for task in stream])
    y = torch.cat([task.everything["y"] for task in stream])
    learner.eval()
    with torch.no_grad():
        features = learner.backbone(x.double())
    for c in y.unique().tolist():
        wanted = features[y == c].mean(0)
        torch.testing.assert_close(strategy.means[c], wanted, atol=1e-10, rtol=1e-10)


def test_neither_order_nor_batches_matter():
    stream = make_stream("class")
    _, one, _ = learned(stream, dtype=torch.float64)
    for order, size in (((2, 0, 1), 10), ((0, 1, 2), 7)):
        _, other, _ = learned(stream, order=order, batch_size=size, dtype=torch.float64)
        torch.testing.assert_close(one.sums, other.sums, atol=1e-10, rtol=0)
        assert torch.equal(one.counts, other.counts)


def test_logits_are_cosines_and_no_sample_sees_another():
    stream = make_stream("class")
    learner, strategy, _ = learned(stream)
    learner.eval()
    batch = stream[0].everything
    with torch.no_grad():
        logits = strategy.predict(learner, batch, None)
        alone = strategy.predict(learner, {k: v[:1] for k, v in batch.items()}, None)
        f, means = learner.features(batch), strategy.means.float()
        wanted = F.cosine_similarity(f[:, None], means[None], dim=2)
    torch.testing.assert_close(logits, wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(logits[:1], alone, atol=1e-6, rtol=0)


def test_where_the_task_is_known_other_classes_are_left_out():
    stream = make_stream("task")
    learner, strategy, _ = learned(stream)
    with torch.no_grad():
        logits = strategy.predict(learner, stream[1].everything, stream[1])
    assert logits[:, list(stream[1].classes)].isfinite().all()
    assert (logits[:, list(stream[0].classes)] == -torch.inf).all()


def test_with_companions_one_plans_and_one_answers():
    with pytest.raises(UsageError, match="both decide 'plan'"):
        Together({"ncm": NCM(), "joint": Joint()})
    stream = make_stream("class")
    engine = learned(stream, Together({"ncm": NCM(), "finetune": Finetune()}))[2]
    alone = learned(stream)[2].evaluate(list(stream), 100, None)
    assert engine.evaluate(list(stream), 100, None) == alone


def test_text_is_refused():
    class Text:
        modality, name, task_id_at_test = "text", "words", False

        def __len__(self):
            return 2

    with pytest.raises(UsageError, match=r"learns features or image or tokens streams"):
        check_pair("ncm", NCM(), Text())
