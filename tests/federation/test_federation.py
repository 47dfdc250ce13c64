"""Federations as a whole: what is forgotten, from the command line, and what is refused."""

import functools

import pytest
import torch
from federations import FEDERATION, engine_of, fot_local, learn
from torch.optim import SGD
from toys import make_learner, make_stream

from cl_bench.contracts import Plan, UsageError
from cl_bench.experiment import check_pair
from cl_bench.federation import Federation, check_federation
from cl_bench.learners import Classifier
from cl_bench.models import MLP
from cl_bench.strategies.federated.fedavg import FedAvg
from cl_bench.strategies.federated.fot import FOT
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.replay.er import ER
from cl_bench.tasks.permuted_digits import PermutedDigits
from cl_bench.tracking import read_results

pytestmark = pytest.mark.usefixtures("no_pictures")


# --- behaviour (invariant 15) ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["iid", "shards"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fot_forgets_less_than_half_of_what_fedavg_forgets(seed, kind):
    stream = PermutedDigits(num_tasks=2)
    shape, sgd = stream.input_shape, functools.partial(SGD, lr=0.1)
    federation = Federation(clients=10, per_round=5, rounds=20, partition=kind)
    lost, newest = {}, {}
    for strategy in (FedAvg(), FOT(eps=0.9)):
        torch.manual_seed(seed)
        learner = Classifier(stream, MLP(shape, (100, 100)), sgd, 10, seed)
        engine = engine_of(learner, strategy, federation, seed=seed)
        rows = []
        for task in stream:
            engine.learn(task, Plan(task.train))
            rows.append(engine.evaluate(list(stream), 2000, None))
        name = type(strategy).__name__
        lost[name] = rows[0]["perm_0"] - rows[1]["perm_0"]
        newest[name] = rows[1]["perm_1"]
    assert lost["FedAvg"] > 0.02
    assert lost["FOT"] < lost["FedAvg"] / 2
    assert newest["FOT"] > newest["FedAvg"] - 0.05


def test_the_command_line_runs_a_federation(cli, tmp_path):
    words = ("+strategy=fot", "+stream=permuted_digits", "+federation=small")
    status, out, err = cli(*words, "stream.num_tasks=2", "federation.rounds=3", "run_dir=run")
    assert status == 0, err
    assert "traffic of all clients" in out
    events = {event["event"] for event in read_results(tmp_path / "run")}
    assert {"round", "federation", "clients", "layers", "evaluation"} <= events
    assert (tmp_path / "run" / "partition.png").exists()


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients": 0}, "clients=0"),
        ({"clients": 2, "per_round": 3}, "per_round=3"),
        ({"rounds": [3, 0]}, r"rounds=\[3, 0\]: every entry: at least 1"),
        ({"partition": "sorted"}, "partition=sorted"),
        ({"participation": 0.0}, "participation=0.0"),
        ({"drop_outs": 1.0}, "drop_outs=1.0"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"secure": "yes"}, "secure=yes"),
        ({"fraction_bits": 60}, "fraction_bits=60"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(UsageError, match=message):
        Federation(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 1.5}, "strategy.eps=1.5"),
        ({"sketch": "fourier"}, "strategy.sketch=fourier"),
        ({"width": 0}, "strategy.width=0"),
        ({"residual_ratio": "squared"}, "residual_ratio=squared"),
        ({"extraction": "server"}, "extraction=server"),
        ({"eps_inc": 2}, "eps_inc=2"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(UsageError, match=message):
        FOT(**options)


def test_what_cannot_run_together_is_refused():
    stream = make_stream()
    with pytest.raises(
        UsageError, match=r"'fot' runs in a federation: add one.*\+federation=small"
    ):
        check_pair("fot", FOT(), stream)
    with pytest.raises(UsageError, match=r"'gpm' learns from one site's data.*docs/federation\.md"):
        check_pair("gpm", GPM(), stream, federated=True)
    for name, strategy in (("fedavg", FedAvg()), ("ewc", EWC()), ("er", ER()), ("fot", FOT())):
        check_pair(name, strategy, stream, federated=True)
        check_federation(FEDERATION, name, strategy, stream, {})
    for strategy, federation, trainer, message in (
        (fot_local(), FEDERATION, {}, "add federation.statistics=sampled"),
        (FOT(), Federation(clients=10, rounds=[1, 2]), {}, "federation.rounds"),
        (FOT(), Federation(clients=50), {}, "federation.clients = 50, but task 't0' has 40"),
        (
            FOT(),
            Federation(clients=30, partition="shards"),
            {},
            "federation.shards_per_client = 60, but task 't0' has 40",
        ),
        (FOT(), FEDERATION, {"precision": "bf16-mixed"}, "trainer.precision=bf16-mixed"),
        (FOT(), FEDERATION, {"gradient_clip_val": 1.0}, "trainer.gradient_clip_val=1.0"),
    ):
        with pytest.raises(UsageError, match=message):
            check_federation(federation, "fot", strategy, stream, trainer)


def test_a_diverging_client_ends_the_run():
    stream = make_stream(tasks=1)
    learner = make_learner(stream, optimizer=functools.partial(SGD, lr=1e12))
    with pytest.raises(UsageError, match=r"on client .* lower the learning rate"):
        list(learn(learner, FedAvg(), stream))


@pytest.mark.parametrize("option", ["eval.dense=[0,5]", "probe.updates.enabled=true"])
def test_what_looks_at_steps_is_refused(cli, option):
    status, _, err = cli(
        "+strategy=fedavg", "+stream=permuted_digits", "+federation=small", "pack=1", option,
        "logger.mode=disabled",
    )  # fmt: skip
    assert status != 0
    assert "look at optimizer steps, a federation has rounds" in err
