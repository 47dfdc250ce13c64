"""GPM's options: where to project, what is protected, thresholds; its state."""

import copy
import io

import pytest
import torch
from gpms import NETWORKS, OPTIMIZERS, WIDE, consolidate, leaks, matrices, setting
from torch import nn
from toys import CLASSES, DIM, learn, learn_stream, make_learner, make_stream, mlp, weights

from cl_bench.contracts import Protect, UsageError
from cl_bench.experiment import Together
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.projection.rogo import ROGO

# -- where auto projects ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "where"),
    [
        ("SGD", "input"),
        ("momentum", "input"),
        ("Nesterov", "input"),
        ("weight decay", "step"),
        ("Adam", "step"),
        ("AdamW", "step"),
        ("RMSprop", "step"),
    ],
)
def test_auto_chooses_a_place_that_holds(optimizer, where):
    stream, learner = setting("mlp", OPTIMIZERS[optimizer])
    gpm = GPM()
    learner.begin(stream[0], gpm)
    assert gpm.confinement.where == where


def test_auto_leaves_the_input_side_where_a_weight_is_reached_otherwise():
    stream, learner = setting("mlp")
    gpm = GPM()
    learner.begin(stream[0], Together({"gpm": gpm, "ewc": EWC()}))
    assert gpm.confinement.where == "gradient"
    shared = mlp(hidden=(WIDE, WIDE, WIDE))
    shared.fc3.weight = shared.fc2.weight
    learner = make_learner(stream, shared)
    learner.begin(stream[0], gpm)
    assert gpm.confinement.where == "gradient"


@pytest.mark.usefixtures("always_inputs")
def test_a_penalty_does_not_lead_out_of_the_subspace():
    stream, learner = setting("mlp")
    gpm = GPM(0.8, samples=40)
    both = Together({"gpm": gpm, "ewc": EWC(strength=10.0, samples=40)})
    learn(learner, both, stream[0])
    before, memory = matrices(learner, gpm.protect), dict(gpm.memory)
    learn(learner, both, stream[1])
    for leak, size in leaks(learner, gpm, before, memory).values():
        assert size > 1e-3
        assert leak < 1e-4


# -- protect: norms, biases, heads, names ----------------------------------------------------------


def normed():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(DIM, WIDE), nn.BatchNorm1d(WIDE), nn.ReLU())


@pytest.mark.parametrize("optimizer", ["momentum", "weight decay", "Adam"])
@pytest.mark.parametrize("norm", ["free", "frozen_after_first"])
def test_norm_policy(norm, optimizer):
    stream = make_stream(tasks=2)
    learner = make_learner(stream, normed(), OPTIMIZERS[optimizer])
    gpm = GPM(0.8, samples=40, protect=Protect(norm=norm))
    fresh = copy.deepcopy(learner.backbone[1].state_dict())
    learn(learner, gpm, stream[0])
    first = copy.deepcopy(learner.backbone[1].state_dict())
    assert all(not torch.equal(first[k], v) for k, v in fresh.items())
    optimizer = learn(learner, gpm, stream[1])
    second = learner.backbone[1].state_dict()
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for k, v in second.items():
        assert torch.equal(first[k], v) == (norm == "frozen_after_first"), k
    for p in learner.backbone[1].parameters():
        assert (id(p) in updated) == (norm == "free")


@pytest.mark.parametrize("bias", ["free", "augmented", "frozen"])
@pytest.mark.parametrize("optimizer", ["SGD", "weight decay", "Adam"])
@pytest.mark.parametrize("network", ["mlp with biases", "cnn"])
def test_bias_policy(network, bias, optimizer):
    stream, learner = setting(network, OPTIMIZERS[optimizer], tasks=2)
    gpm = GPM(0.8, samples=40, protect=Protect(bias=bias))
    start = weights(learner)
    learn(learner, gpm, stream[0])
    before, memory, first = matrices(learner, gpm.protect), dict(gpm.memory), weights(learner)
    learn(learner, gpm, stream[1])
    for layer in learner.layers(gpm.protect):
        expected = layer.weight[0].numel() + (bias == "augmented" and layer.bias is not None)
        assert memory[layer.name].shape[0] == expected
    for leak, size in leaks(learner, gpm, before, memory).values():
        assert size > 1e-3
        assert leak < 1e-4
    for name, weight in weights(learner).items():
        if name.endswith("bias"):
            assert not torch.equal(first[name], start[name]), name
            assert torch.equal(weight, first[name]) == (bias == "frozen"), name


@pytest.mark.parametrize(
    ("scenario", "heads", "guarded"),
    [
        ("domain", "auto", ["heads.0"]),
        ("domain", "never", []),
        ("domain", "always", ["heads.0"]),
        ("task", "auto", []),
        ("class", "auto", ["heads.0", "heads.1", "heads.2"]),
        ("class", "never", []),
        ("class", "always", ["heads.0", "heads.1", "heads.2"]),
        ("task", "always", ["heads.0", "heads.1", "heads.2"]),
    ],
)
def test_head_policy(scenario, heads, guarded):
    stream = make_stream(scenario)
    learner = make_learner(stream)
    gpm = GPM(0.8, samples=40, protect=Protect(heads=heads))
    learn_stream(learner, gpm, stream, epochs=2)
    assert list(gpm.memory) == ["backbone.fc1", "backbone.fc2", *guarded]


def test_heads_that_are_one_are_guarded_as_one():
    """As the rows of a single output layer would be, those of tasks to come included."""
    stream = make_stream("class", tasks=2)
    learner, gpm = make_learner(stream), GPM(1.0)
    learn(learner, gpm, stream[0])
    old, first = gpm.memory["heads.0"], weights(learner)
    assert torch.equal(old, gpm.memory["heads.1"])
    with torch.no_grad():
        x = stream[0].everything["x"]
        features = learner.backbone(x)
        before = [head(features) for head in learner.heads]
    assert float((features.double() - features.double() @ old @ old.t()).norm()) < 1e-4
    learn(learner, gpm, stream[1])
    with torch.no_grad():
        after = [head(learner.backbone(x)) for head in learner.heads]
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    for i in range(2):
        moved = weights(learner)[f"heads.{i}.weight"] - first[f"heads.{i}.weight"]
        assert float(moved.norm()) > 1e-3


def test_with_the_task_known_old_answers_stay():
    stream = make_stream("task", tasks=2, n=4, subspace=3)
    learner = make_learner(stream, batch_size=4)
    gpm = GPM(1.0, rank_rule="energy")
    learn(learner, gpm, stream[0], epochs=10, batch_size=4)
    old = stream[0].everything
    before = learner(old).detach()[:, :CLASSES]
    head = learner.heads[0].weight.detach().clone()
    learn(learner, gpm, stream[1], epochs=10, batch_size=4)
    assert torch.equal(learner.heads[0].weight, head)
    torch.testing.assert_close(learner(old)[:, :CLASSES].detach(), before, atol=1e-4, rtol=1e-4)


def test_include_and_exclude():
    stream = make_stream()
    learner = make_learner(stream)
    for protect, expected in (
        (Protect(include=("*.fc*",)), ["backbone.fc1", "backbone.fc2"]),
        (Protect(exclude=("*.fc1",)), ["backbone.fc2", "heads.0"]),
        (Protect(include=("backbone.*",), exclude=("*2",)), ["backbone.fc1"]),
    ):
        gpm = GPM(0.8, samples=40, protect=protect)
        learn(learner, gpm, stream[0], epochs=1)
        assert list(gpm.memory) == expected
    with pytest.raises(UsageError, match=r"protect\.include.*nothing.*backbone\.fc1.*heads\.0"):
        learner.layers(Protect(include=("nothing",)))


# -- thresholds ------------------------------------------------------------------------------------


def ranks(gpm):
    return [M.shape[1] for M in gpm.memory.values()]


def test_thresholds_by_number_list_and_pattern():
    found = {}
    for name, threshold in {
        "low": 0.5,
        "high": 0.95,
        "list": [0.5, 0.95, 0.5],
        "mapping": {"*.fc2": 0.95, "*": 0.5},
    }.items():
        stream, learner = setting("mlp")
        gpm = GPM(threshold, samples=40)
        learn(learner, gpm, stream[0])
        found[name] = ranks(gpm)
    assert all(a < b for a, b in zip(found["low"], found["high"], strict=True))
    assert found["list"] == [found["low"][0], found["high"][1], found["low"][2]]
    assert found["mapping"] == found["list"]


@pytest.mark.parametrize("samples", [[7, 40, 1], {"*.fc1": 7, "*.fc2": 40, "*": 1}])
def test_samples_by_layer_are_the_first_of_one_draw(samples):
    stream, learner = setting("mlp")
    gpm = GPM(samples=samples)
    learner.begin(stream[0], gpm)
    found = gpm.collect(learner, stream[0])
    batch = stream[0].sample(40, learner.seed)
    assert [m.samples for m in found.values()] == [7, 40, 1]
    for layer, n in zip(learner.layers(gpm.protect), (7, 40, 1), strict=True):
        expected = learner.tap([layer], [{k: v[:n] for k, v in batch.items()}])[layer.name]
        torch.testing.assert_close(found[layer.name].gram, expected.gram)


def test_samples_by_layer_want_an_entry_for_each():
    stream, learner = setting("mlp")
    with pytest.raises(UsageError, match=r"samples=\[7, 40\] has 2 entries, but 3 layers"):
        learner.begin(stream[0], GPM(samples=[7, 40]))
    with pytest.raises(UsageError, match=r"samples=\[7\].*one number"):
        ROGO(samples=[7], representation="gradients")


def test_increment_raises_the_threshold_by_task_up_to_1():
    R = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0]).sqrt()).double()
    steady = GPM(0.6, rank_rule="energy")
    rising = GPM(0.6, increment=0.3, rank_rule="energy")
    assert [consolidate(steady, R, t).shape[1] for t in range(3)] == [2, 2, 2]
    assert [consolidate(rising, R, t).shape[1] for t in range(3)] == [2, 4, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, r"threshold=0\.0: must lie in \(0, 1\]; by default 0\.95"),
        ({"threshold": 1.5}, r"threshold=1\.5"),
        ({"threshold": float("nan")}, r"threshold=nan"),
        ({"threshold": [0.9, -1.0]}, r"threshold=\[0\.9, -1\.0\]: every entry: must lie"),
        ({"threshold": {"*": 2}}, r"threshold=\{\*: 2\}: every entry: must lie"),
        ({"threshold": "0.9"}, r"threshold=.*0"),
        ({"samples": 0}, r"samples=0: at least 1"),
        ({"samples": [10, 0.5]}, r"samples=\[10, 0\.5\]: every entry: must be a whole number"),
        ({"rank_rule": "best"}, r"rank_rule=best: use official or energy"),
        ({"project": "weights"}, r"project=weights: use auto, input, gradient, step or both"),
    ],
)
def test_bad_options_are_named_with_a_remedy(options, message):
    with pytest.raises(UsageError, match=message):
        GPM(**options)


@pytest.mark.parametrize("option", ["bias", "norm", "heads"])
def test_bad_protection_is_named_with_a_remedy(option):
    with pytest.raises(UsageError, match=rf"protect\.{option}=odd: use "):
        Protect(**{option: "odd"})


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        ([0.9, 0.9], r"has 2 entries.*3 layers"),
        ({"conv*": 0.9}, r"no pattern matches layer 'backbone\.fc1'"),
    ],
)
def test_thresholds_that_do_not_fit_the_network(threshold, message):
    stream, learner = setting("mlp")
    with pytest.raises(UsageError, match=message):
        learn(learner, GPM(threshold), stream[0], epochs=1)


# -- state and edges -------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_state_goes_on_bit_for_bit_after_a_round_trip(network):
    stream, learner = setting(network)
    gpm = GPM(0.8, samples=40)
    learn_stream(learner, gpm, stream[:2])
    file = io.BytesIO()
    torch.save(gpm.state_dict(), file)
    file.seek(0)
    again, twin = GPM(0.8, samples=40), copy.deepcopy(learner)
    again.load_state_dict(torch.load(file, weights_only=True))
    learn(learner, gpm, stream[2])
    learn(twin, again, stream[2])
    for name, weight in weights(learner).items():
        assert torch.equal(weight, weights(twin)[name])
    assert all(torch.equal(M, again.memory[n]) for n, M in gpm.memory.items())
    assert gpm.metrics() == again.metrics()
    assert gpm.rows_per_sample == again.rows_per_sample


def test_rows_per_sample_count_patches():
    stream, learner = setting("cnn")
    gpm = GPM(samples=40)
    learn(learner, gpm, stream[0], epochs=1)
    assert list(gpm.rows_per_sample.values()) == [36, 4, 4, 4, 1, 1]


def test_a_layer_of_rank_0_stays_free_beside_others():
    stream, learner = setting("mlp", tasks=2)
    gpm = GPM({"*.fc1": 1e-9, "*": 0.8}, samples=40)
    learn(learner, gpm, stream[0])
    assert gpm.metrics()["backbone.fc1"] == {"rank": 0, "capacity_left": 1.0}
    before, memory = matrices(learner, gpm.protect), dict(gpm.memory)
    learn(learner, gpm, stream[1])
    found = leaks(learner, gpm, before, memory)
    assert found["backbone.fc1"][1] > 1e-2
    assert found["backbone.fc2"][0] < 1e-4
    assert gpm.memory["backbone.fc1"].shape[1] == 1  # later tasks take the crossing direction in


def test_gradients_of_the_learner_are_raw_while_layers_are_confined(always_inputs):
    stream, learner = setting("mlp", tasks=2)
    gpm = GPM(0.8, samples=40)
    learn(learner, gpm, stream[0])
    batch = stream[1].everything
    learner.begin(stream[1], Finetune())
    raw = learner.gradients(batch)
    learner.begin(stream[1], gpm)
    assert type(learner.backbone.fc1) is not nn.Linear
    for per_sample in (False, True):
        for name, gradient in learner.gradients(batch, per_sample=per_sample).items():
            gradient = gradient.mean(0) if per_sample else gradient
            torch.testing.assert_close(gradient, raw[name], atol=1e-6, rtol=1e-5)
