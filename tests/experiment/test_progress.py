"""Where training stands, as strategies are told: in packs, in clients' fits, after a resume."""

import dying
import pytest
import torch
from toys import make_engine, make_learner, make_stream

from cl_bench.contracts import LOCAL_OR_FEDERATED, FederatedStrategy, Needs, Plan
from cl_bench.federation.client import Turn, client_fit
from cl_bench.federation.partition import ClientTask, Part
from cl_bench.strategies.baselines.finetune import Finetune


class Follows(FederatedStrategy):
    """Writes down where training stands; all of it is part of its state."""

    needs = Needs(engines=LOCAL_OR_FEDERATED)

    def __init__(self):
        self.seen = []

    def setup(self, learner, task):
        self.seen.append(["setup", *learner.progress])

    def penalty(self, learner, batch, out):
        self.seen.append(["penalty", *learner.progress])

    def after_step(self, learner, batch, out):
        self.seen.append(["stepped", *learner.progress])

    def collect(self, learner, task):
        self.seen.append(["collect", *learner.progress])
        return {}

    def state_dict(self):
        return {"seen": list(self.seen)}

    def load_state_dict(self, state):
        self.seen = list(state["seen"])


def expected(epochs, batches, window=1):
    """What it writes down of a task."""
    steps, seen = 0, [["setup", None, 0, 0, 0, 0]]
    planned = epochs * -(-batches // window)
    for epoch in range(epochs):
        for batch in range(1, batches + 1):
            seen.append(["penalty", None, epoch, steps, planned, epochs])
            if batch % window == 0 or batch == batches:
                steps += 1
                seen.append(["stepped", None, epoch, steps, planned, epochs])
    return [*seen, ["collect", None, epochs - 1, steps, planned, epochs]]


def begun():
    stream = make_stream()
    learner = make_learner(stream)
    learner.begin(stream[0], Finetune())
    return learner, stream[0].everything


@pytest.mark.parametrize(("pack", "window"), [(1, 1), (4, 1), (3, 1), (1, 2)])
def test_progress_is_counted_in_steps(pack, window):
    stream = make_stream(n=44)
    strategy, learner = Follows(), make_learner(stream, pack=pack)
    options = {"accumulate_grad_batches": window} if window > 1 else {}
    engine = make_engine(learner, strategy, epochs=3, pack=pack, **options)
    for task in stream[:2]:
        engine.learn(task, Plan(task.train))
    assert strategy.seen == 2 * expected(3, 5, window)


@pytest.mark.parametrize("options", [{"pack": 2}, {"accumulate_grad_batches": 2}])
def test_progress_goes_on_where_a_run_was_killed(tmp_path, options):
    dying.die(tmp_path, Follows, dies_at=23, every=3, **options)
    _, strategy = dying.learn(tmp_path, Follows, resume=True, every=3, **options)
    wanted = expected(3, 5, options.get("accumulate_grad_batches", 1))
    # What training saw before it was killed is not replayed, ``setup`` is.
    assert [line for line in strategy.seen if line[0] != "setup"] == 3 * wanted[1:]


def test_a_checkpoint_from_before_there_was_progress_loads():
    learner, batch = begun()
    learner._watch(learner._learn(batch))
    state = learner.progress_state()
    del state["position"]
    learner.load_progress_state(state)
    assert learner.progress.step == 1


def test_phases_count_for_themselves():
    learner, _ = begun()
    learner.stand("second", 0, 4, 8)
    for _ in range(3):
        learner._count_step()
    learner.stand("second", 1, 4, 8)
    assert learner.progress == ("second", 1, 3, 8, 4)
    state = learner.progress_state()
    learner.stand(None, 0, 1, 1)
    assert learner.progress.step == 0
    learner.load_progress_state(state)
    learner.stand("second", 1, 4, 8)
    assert learner.progress == ("second", 1, 3, 8, 4)


def test_progress_of_a_clients_fit():
    stream = make_stream(n=23)
    strategy, learner = Follows(), make_learner(stream)
    task = ClientTask(stream[0], Part(stream[0].train, torch.arange(23)))
    weights = {k: v.clone() for k, v in learner.named_parameters()}
    for turn in range(2):
        client_fit(learner, strategy, weights, task, Turn(0, 0, turn, 1), 2)
    assert strategy.seen == 2 * expected(2, 3)[:-1]
