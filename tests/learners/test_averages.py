"""Means over unequal batches, windows and token counts: everywhere sums over counts."""

import functools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from texts import make_learner as make_reader
from texts import make_stream as make_prompts
from torch import nn
from torch.optim import SGD
from toys import DIM, ToyTask, make_engine, make_learner, weights

from cl_bench.contracts import Loss, Plan, Stream, generator
from cl_bench.experiment import LoopSettings, Plateau
from cl_bench.learners.window import Window
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.projection.gpm import GPM

RATE = 0.5


def uneven(n, scenario="domain", tasks=1):
    """Samples of which one has a far larger loss than the others."""
    made = []
    for t in range(tasks):
        rng = generator(0, "uneven", t)
        x, y = torch.randn(n, DIM, generator=rng), torch.randint(0, 3, (n,), generator=rng)
        x[n // 3] *= 50
        made.append(ToyTask(t, 0, range(3), x, y))
    return Stream("uneven", made, scenario, (DIM,), "uneven")


class Events:
    def __init__(self):
        self.epochs = []

    def epoch(self, *_, **event):
        if event:
            self.epochs.append(event)

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def learned(stream, strategy=None, batch_size=8, rate=RATE, epochs=1, schedule=None, **options):
    """A learner after the stream, and the epochs that were recorded."""
    pack, eval_batch = options.pop("pack", 1), options.pop("eval_batch", 2000)
    model = options.pop("model", None) or nn.Flatten()
    learner = make_learner(
        stream, model, functools.partial(SGD, lr=rate), batch_size=batch_size, pack=pack
    )
    strategy = strategy or Finetune()
    made = make_engine(learner, strategy, epochs, pack, batch_size, **options)
    settings = LoopSettings(0, batch_size, pack, 0, schedule, eval_batch)
    events = Events()
    engine = type(made)(learner, strategy, made.trainer, settings, None, events, events)
    for task in stream:
        engine.learn(task, Plan(task.train))
    return learner, events.epochs


def by_hand(stream, windows):
    """Plain steps on the mean over each window's samples."""
    learner = make_learner(stream, nn.Flatten())
    task = stream[0]
    order = torch.randperm(len(task.data), generator=generator(0, "order", 0, 0))
    for rows in torch.split(order, windows):
        loss = F.cross_entropy(learner(task.data[rows]), task.data[rows]["y"])
        for p in learner.parameters():
            p.data -= RATE * torch.autograd.grad(loss, p, retain_graph=True)[0]
    return weights(learner)


@pytest.mark.parametrize(
    ("n", "every", "windows"),
    [
        (40, 3, [24, 16]),  # a short window
        (44, 3, [24, 20]),  # a short window that ends in a short batch
        (44, 6, [44]),
        (48, 3, [24, 24]),
    ],
)
def test_a_step_takes_the_mean_over_its_windows_samples(n, every, windows):
    stream = uneven(n)
    found, _ = learned(stream, accumulate_grad_batches=every)
    for name, expected in by_hand(stream, windows).items():
        torch.testing.assert_close(weights(found)[name], expected, atol=1e-6, rtol=1e-5)


def test_windows_are_weighed_before_clipping():
    stream = uneven(40)
    clip = {"gradient_clip_val": 0.1}
    found = weights(learned(stream, accumulate_grad_batches=5, **clip)[0])
    whole = weights(learned(stream, batch_size=40, **clip)[0])
    for name, expected in whole.items():
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-5)


def test_windows_are_weighed_before_projections():
    """Two tasks of 44 samples, in one batch or in six: the same constrained weights."""
    found, whole = (
        weights(learned(uneven(44, tasks=2), GPM(0.9, samples=40), batch_size=size, **options)[0])
        for size, options in ((8, {"accumulate_grad_batches": 6}), (44, {}))
    )
    for name, expected in whole.items():
        torch.testing.assert_close(found[name], expected, atol=1e-4, rtol=1e-4)


def test_equal_batches_in_a_window_keep_the_bits():
    window, weight = Window(), nn.Parameter(torch.tensor([0.1, 0.3]))
    optimizer = SGD([weight], lr=1.0)
    for _ in range(3):
        loss = (weight**3).sum()
        assert window.weigh(loss, 8) is loss
        (loss / 3).backward()
    before = weight.grad.clone()
    window.settle(optimizer, 3)
    assert torch.equal(weight.grad, before)


@pytest.mark.parametrize("counts", [(8, 11, 5), (2, 0, 7), (3, 3, 3)])
def test_counts_need_not_be_known_beforehand(counts):
    """Replay makes batches of any size: the window's step is the mean over all of it."""
    slopes, window, weight = (1.0, -2.0, 5.0), Window(), nn.Parameter(torch.ones(()))
    for slope, count in zip(slopes, counts, strict=True):
        (window.weigh(weight * slope, count) / len(counts)).backward()
    window.settle(SGD([weight], lr=1.0), len(counts))
    mean = sum(s * n for s, n in zip(slopes, counts, strict=True)) / sum(counts)
    assert float(weight.grad) == pytest.approx(mean, rel=1e-6)


def test_accumulated_answers_weigh_by_their_tokens():
    """Answers of 4 to 11 tokens, four at once or one by one: the same step."""
    ended = []
    for size, every in ((4, 1), (1, 4)):
        learner = make_reader("t5", make_prompts(), functools.partial(SGD, lr=RATE))
        engine = make_engine(
            learner,
            Finetune(),
            1,
            1,
            size,
            accumulate_grad_batches=every,
            limit_train_batches=every,
        )
        engine.learn(learner.prompts[1], Plan(learner.prompts[1].train))
        ended.append(weights(learner))
    for name, expected in ended[0].items():
        torch.testing.assert_close(ended[1][name], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pack", [1, 4])
@pytest.mark.parametrize("batch_size", [33, 32, 16])
def test_an_epochs_loss_is_the_mean_over_its_samples(pack, batch_size):
    stream = uneven(33)
    learner, epochs = learned(stream, batch_size=batch_size, rate=1e-12, pack=pack)
    right = float(learner.loss(learner(stream[0].everything), stream[0].everything).detach())
    assert epochs[0]["train_loss"] == pytest.approx(right, rel=1e-6)


@pytest.mark.parametrize("eval_batch", [33, 32, 8, 1])
def test_the_validation_loss_does_not_depend_on_its_batches(eval_batch):
    stream = uneven(33)
    learner, epochs = learned(
        stream, rate=1e-12, schedule=Plateau(min_rate=0.0), eval_batch=eval_batch
    )
    right = float(learner.loss(learner(stream[0].everything), stream[0].everything).detach())
    assert epochs[0]["validation_loss"] == pytest.approx(right, rel=1e-6)


def test_losses_add_up_by_tokens():
    learner = make_reader("gpt2").eval()
    data = learner.prompts[1].train
    whole = data[torch.arange(len(data))]
    pieces = [data[torch.tensor([i])] for i in range(len(data))]
    with torch.no_grad():
        parts = [learner.total_loss(learner(piece), piece) for piece in pieces]
        summed = functools.reduce(Loss.__add__, parts)
        assert float(summed.mean) == pytest.approx(float(learner.loss(learner(whole), whole)))
        assert summed.count == learner.loss_terms(whole)
        assert float(torch.stack([p.mean for p in parts]).mean()) != pytest.approx(
            float(summed.mean), rel=1e-4
        )


def test_a_batch_without_labels_has_no_loss():
    learner = make_reader("t5")
    batch = learner.prompts[0].train[torch.arange(2)]
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert float(learner.loss(torch.randn(2, batch["labels"].shape[1], 7), batch)) == 0.0


def test_batches_of_counts_on_a_device_are_weighed_as_exactly_as_the_loss_is():
    window, loss = Window(), torch.ones((), dtype=torch.float64)
    window.weigh(loss, torch.tensor(3))
    assert float(window.weigh(loss, torch.tensor(7))) == 7 / 3
    single = Window()
    single.weigh(loss.float(), torch.tensor(3))
    assert single.weigh(loss.float(), torch.tensor(7)).dtype == torch.float32
