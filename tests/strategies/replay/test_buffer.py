"""What is kept of old tasks."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import make_stream

from cl_bench.contracts import augmented, likewise
from cl_bench.data import MemoryData
from cl_bench.strategies.replay.buffer import (
    Exemplars,
    Part,
    Reservoir,
    as_in_training,
    herd,
    labels_of,
    rows_by_class,
)
from cl_bench.tasks.augmented import Augmented, Flip


def numbered(classes, each):
    y = torch.arange(classes).repeat_interleave(each)
    return MemoryData({"x": torch.arange(len(y)).float().unsqueeze(1), "y": y})


def bare_herding(features, count):
    """Algorithm 4 of iCaRL, as it is written."""
    mean, chosen = features.mean(0), []
    for k in range(1, count + 1):
        best, least = None, float("inf")
        for i in range(len(features)):
            if i in chosen:
                continue
            total = sum((features[j] for j in chosen), torch.zeros_like(mean))
            apart = float((mean - (total + features[i]) / k).norm())
            if apart < least - 1e-12:
                best, least = i, apart
        chosen.append(best)
    return chosen


def test_herding_is_that_of_the_paper_and_fewer_are_a_prefix():
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        features = torch.randn(14, 4, generator=rng, dtype=torch.float64)
        features = torch.nn.functional.normalize(features, dim=1)
        order = herd(features, 14).tolist()
        assert order == bare_herding(features, 14)
        assert sorted(order) == list(range(14))
        for few in (0, 1, 5):
            assert herd(features, few).tolist() == order[:few]
        assert herd(features, 99).tolist() == order


def test_herded_samples_have_nearer_means_than_random_ones():
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(200, 8, generator=rng, dtype=torch.float64)
    herded = (features[herd(features, 10)].mean(0) - features.mean(0)).norm()
    drawn = [
        (features[torch.randperm(200, generator=rng)[:10]].mean(0) - features.mean(0)).norm()
        for _ in range(20)
    ]
    assert herded < min(drawn) / 3


@settings(max_examples=30)
@given(st.integers(1, 40), st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_every_class_keeps_as_many_and_the_first_of_its_order(memory, tasks):
    kept, data, start = Exemplars(memory), numbered(sum(tasks), 9), 0
    orders = {}
    for classes in tasks:
        new = rows_by_class(data.tensors["y"], range(start, start + classes))
        new = {c: rows.flip(0) for c, rows in new.items()}
        orders |= new
        kept.take(data, new)
        start += classes
        quota = min(9, memory // start)
        assert len(kept) == quota * start <= memory
        for c, rows in orders.items():
            assert torch.equal(kept.classes[c]["x"][:, 0].long(), rows[:quota])
            assert (kept.classes[c]["y"] == c).all()
    again = Exemplars(memory)
    again.load_state_dict(kept.state_dict())
    for k, v in kept.batch().items():
        assert torch.equal(again.batch()[k], v)


def test_rows_that_became_longer_have_zeros_in_what_is_kept():
    kept = Reservoir(4)
    kept.begin(0)
    kept.offer({"logits": torch.ones(2, 3)})
    kept.offer({"logits": torch.ones(2, 5)})
    assert kept.buffer["logits"].tolist() == [[1, 1, 1, 0, 0]] * 2 + [[1] * 5] * 2
    kept.offer({"logits": torch.full((30, 5), 2.0)})
    assert kept.buffer["logits"].shape == (4, 5)


def test_what_is_kept_goes_through_the_augmentation_of_the_task():
    x = torch.arange(24.0).view(6, 1, 2, 2)
    data = Augmented(MemoryData({"x": x, "y": torch.arange(6)}), Flip())
    other = {"x": x[:4] + 100, "y": torch.arange(4)}
    seen = [as_in_training(other, data, seed)["x"] for seed in range(8)]
    for view in seen:
        for one, kept in zip(view, other["x"], strict=True):
            assert torch.equal(one, kept) or torch.equal(one, kept.flip(2))
    assert any(not torch.equal(a, b) for a, b in itertools.pairwise(seen))
    assert other.keys() == as_in_training(other, data, 0).keys()
    assert as_in_training(other, data.data, 0) is other
    part = Part(likewise(data, Part(other)), torch.tensor([3, 1]))
    assert torch.equal(augmented(part, 0)[torch.arange(2)]["plain"], other["x"][[3, 1]])


def test_classes_are_found_whether_or_not_data_lie_in_memory():
    task = make_stream("class")[1]
    labels = labels_of(task)
    assert torch.equal(labels, task.everything["y"])

    class Elsewhere:
        train = Part(task.train, torch.arange(len(task.train)))

    assert torch.equal(labels_of(Elsewhere()), labels)
    found = rows_by_class(labels, range(9))
    assert sorted(found) == list(task.classes)
    assert torch.cat(list(found.values())).sort().values.tolist() == list(range(40))
