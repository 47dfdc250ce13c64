"""What training batches carry beside the data: positions, and samples without augmentation."""

import dying
import pytest
import texts
import torch
from toys import ToyTask, make_engine, make_learner, make_stream

from cl_bench.contracts import (
    LOCAL_OR_FEDERATED,
    FederatedStrategy,
    Needs,
    Plan,
    UsageError,
)
from cl_bench.data import MemoryData
from cl_bench.experiment import Together, TrainLoader
from cl_bench.federation.client import Turn, client_fit
from cl_bench.federation.partition import ClientTask, Part
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.baselines.joint import Joint
from cl_bench.strategies.replay.er import ER
from cl_bench.tasks.augmented import Augmented, Crop, Flip, InTurn

BOTH = Needs(sample_index=True, plain_view=True, engines=LOCAL_OR_FEDERATED)


class Noise:
    """Something is added to every input."""

    draws = 12

    def __call__(self, x, drawn):
        return x + drawn


class Looks(FederatedStrategy):
    """Keeps the batches of every epoch."""

    needs = BOTH

    def __init__(self):
        self.batches = []

    def on_batch(self, learner, batch):
        self.batches.append(batch)
        return batch


def noisy_stream(scenario="domain", **options):
    stream = make_stream(scenario, **options)
    for task in stream:
        task.data = Augmented(task.data, Noise())
    return stream


def numbers(n=23):
    return MemoryData({"x": torch.randn(n, 12), "y": torch.arange(n) % 3})


def epoch(loader):
    """All samples of the loader's next epoch, batch by batch or pack by pack, in its order."""
    items = list(loader)
    names, depth = list(items[0]), items[0]["y"].dim()
    return {
        name: torch.cat([i[name].flatten(0, depth - 1) if depth > 1 else i[name] for i in items])
        for name in names
    }


def sorted_by_index(batch):
    order = batch["index"].argsort()
    return {name: value[order] for name, value in batch.items()}


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize(("pack", "workers"), [(1, 0), (3, 0), (1, 2)])
def test_every_epoch_has_each_position_once_and_samples_as_they_are(augment, pack, workers):
    data = numbers()
    given = Augmented(data, Noise()) if augment else data
    loader = TrainLoader(given, 5, 0, 0, pack, workers, needs=BOTH)
    one = TrainLoader(given, 4, 0, 0, needs=BOTH)
    for _ in range(1 if workers else 2):
        found, other = sorted_by_index(epoch(loader)), sorted_by_index(epoch(one))
        assert found["index"].tolist() == list(range(23))
        assert torch.equal(found["plain"], data.tensors["x"])
        assert torch.equal(found["y"], data.tensors["y"])
        assert torch.equal(found["x"], data.tensors["x"]) != augment
        assert torch.equal(found["x"], other["x"]), "it depends on how batches are cut or fetched"


def test_each_epoch_and_task_is_augmented_in_its_own_way():
    data = Augmented(numbers(), Noise())
    loader = TrainLoader(data, 5, 0, 0, needs=BOTH)
    seen = [sorted_by_index(epoch(loader))["x"] for _ in range(2)]
    seen.append(sorted_by_index(epoch(TrainLoader(data, 5, 0, 1, needs=BOTH)))["x"])
    seen.append(sorted_by_index(epoch(TrainLoader(data, 5, 1, 0, needs=BOTH)))["x"])
    for i, one in enumerate(seen):
        assert not any(torch.equal(one, other) for other in seen[:i])
    later = TrainLoader(data, 5, 0, 0, needs=BOTH)
    later.resume_at(1, 2)
    whole = TrainLoader(data, 5, 0, 0, needs=BOTH)
    list(whole)
    assert torch.equal(epoch(later)["x"], epoch(whole)["x"][10:])


def test_nothing_is_added_that_nobody_asks_for():
    for data in (numbers(), Augmented(numbers(), Noise())):
        (batch,) = TrainLoader(data, 23, 0, 0)
        assert set(batch) == {"x", "y"}
    index = torch.arange(5)
    assert torch.equal(data[index]["x"], data.data[index]["x"]), "by index, it is as it is"


def test_names_of_the_streams_own_are_not_written_over():
    data = MemoryData({**numbers().tensors, "index": torch.arange(23)})
    with pytest.raises(UsageError, match="a tensor 'index' of their own"):
        list(TrainLoader(data, 5, 0, 0, needs=BOTH))


def test_text_has_positions_only():
    stream = texts.make_stream()
    (batch,) = TrainLoader(stream[0].train, 99, 0, 0, needs=BOTH)
    assert batch["index"].sort().values.tolist() == list(range(9))
    assert "plain" not in batch
    learner = texts.make_learner("gpt2", stream)
    learner.begin(stream[0], Finetune())
    assert learner.training_step(batch, 0).isfinite()


# -- transforms ------------------------------------------------------------------------------------


def test_crop_and_flip_are_what_they_say():
    x, drawn = torch.randn(90, 2, 6, 5), torch.rand(90, 3)
    found = InTurn((Crop(2), Flip()))(x, drawn)
    seen = set()
    for i in range(90):
        top, left = (int(5 * number) for number in drawn[i, :2])
        wanted = torch.zeros(2, 6, 5)
        for row in range(6):
            for column in range(5):
                a, b = row + top - 2, column + left - 2
                if 0 <= a < 6 and 0 <= b < 5:
                    wanted[:, row, column] = x[i, :, a, b]
        flipped = bool(drawn[i, 2] < 0.5)
        assert torch.equal(found[i], wanted.flip(2) if flipped else wanted)
        seen.add((top, flipped))
    assert len(seen) == 10


# -- runs ------------------------------------------------------------------------------------------


def test_companions_and_replay_see_them():
    stream, looks = noisy_stream(), Looks()
    together = Together({"er": ER(20), "looks": looks})
    assert together.needs.sample_index
    assert together.needs.plain_view
    learner = make_learner(stream)
    engine = make_engine(learner, together, epochs=1)
    for task in stream[:2]:
        engine.learn(task, Plan(task.train))
    data = stream[1].data.data.tensors["x"]
    own = [batch["index"][:10] for batch in looks.batches[4:]]
    assert torch.cat(own).sort().values.tolist() == list(range(40))
    for batch, index in zip(looks.batches[4:], own, strict=True):
        assert torch.equal(batch["plain"][:10], data[index])
        assert len(batch["plain"]) == 20  # with what is replayed
    kept = together.members[0].buffer
    assert not torch.equal(kept["x"], kept["plain"])


def test_a_union_is_augmented_part_by_part():
    stream, looks = noisy_stream(), Looks()
    data = Joint().plan(stream, 1).data
    make_engine(make_learner(stream), looks, epochs=1).learn(stream[1], Plan(data))
    whole = sorted_by_index({k: torch.cat([b[k] for b in looks.batches]) for k in looks.batches[0]})
    wanted = torch.cat([task.data.data.tensors["x"] for task in stream[:2]])
    assert torch.equal(whole["plain"], wanted)
    noise = whole["x"] - wanted
    assert float(noise.min()) >= -1e-6
    assert not torch.allclose(noise[:40], noise[40:])
    stream[0].data = stream[0].data.data
    with pytest.raises(UsageError, match="augment all of them or none"):
        next(iter(TrainLoader(Joint().plan(stream, 1).data, 9, 0, 0)))


def test_a_part_of_a_stream_is_augmented_too():
    task = noisy_stream("class")[1:][0]
    assert not isinstance(task, ToyTask)
    (batch,) = TrainLoader(task.train, 40, 0, 0, needs=BOTH)
    batch = sorted_by_index(batch)
    assert torch.equal(batch["plain"], task.train[torch.arange(40)]["x"])
    assert not torch.equal(batch["plain"], batch["x"])


def test_clients_count_their_own_samples():
    stream, looks = noisy_stream(), Looks()
    learner, rows = make_learner(stream), torch.tensor([3, 30, 8, 21, 7, 12])
    task = ClientTask(stream[0], Part(stream[0].train, rows))
    weights = {k: v.clone() for k, v in learner.named_parameters()}
    for turn in (0, 1, 0):
        client_fit(learner, looks, weights, task, Turn(0, 0, turn, 1), 2)
    seen = [sorted_by_index(batch) for batch in looks.batches]
    for batch in seen:
        assert batch["index"].tolist() == list(range(6))
        assert torch.equal(batch["plain"], stream[0].data.data.tensors["x"][rows])
    assert not any(torch.equal(seen[0]["x"], other["x"]) for other in seen[1:4])
    assert torch.equal(seen[0]["x"], seen[4]["x"]), "the same turn again"


def test_a_killed_run_repeats_the_same_augmentation(tmp_path, monkeypatch):
    monkeypatch.setattr(dying, "make_stream", noisy_stream)
    dying.learn(tmp_path / "whole", pack=2)
    dying.die(tmp_path / "killed", dies_at=23, pack=2)
    dying.learn(tmp_path / "killed", pack=2, resume=True)
    dying.same(tmp_path / "whole", tmp_path / "killed")
