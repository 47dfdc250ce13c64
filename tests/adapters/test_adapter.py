"""Which layers get adapters, how large they are, and what is refused in one line."""

import functools

import pytest
import torch
from nets import CLASSES, NAMES, Setting, adapter, classes, make_learner, setting
from torch import nn
from torch.optim import SGD

from cl_bench.adapters.attached import Attached
from cl_bench.adapters.targets import chosen
from cl_bench.adapters.trial import START, fitted, trial
from cl_bench.contracts import UsageError
from cl_bench.experiment import Together
from cl_bench.learners import Classifier
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.lowrank.o_lora import OLoRA
from cl_bench.strategies.merging.merge import Merge
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.replay.er import ER
from cl_bench.strategies.replay.gdumb import GDumb
from cl_bench.subspace import acting_weight, linear_maps

pytest.importorskip("peft")
pytest.importorskip("transformers")

ATTENTION = {
    "vit": ("q_proj", "k_proj", "v_proj", "o_proj", "query", "key", "value"),
    "bert": ("query", "key", "value"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "t5": ("q", "k", "v", "o"),
}


# -- targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_is_seen_not_spelled(kind):
    _, learner = make_learner(kind)
    around, others, every = (
        [m.name for m in chosen(learner, [k])] for k in ("attention", "mlp", "linear")
    )
    assert sorted(around + others) == sorted(every)
    named = {n for n in every if "attention" in n.lower() or "attn" in n.lower()}
    assert set(around) == named
    assert all(n.rpartition(".")[2] in (*ATTENTION[kind], "dense") for n in around)
    assert others
    assert not any(n.startswith("heads") for n in every)
    assert all(p.requires_grad for p in learner.parameters())


class Unnamed(nn.Module):
    """Attention by hand, whose layers' names say nothing."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(6))

    def forward(self, x):
        a, b, c, d, e, f = self.layers
        x = x.reshape(len(x), -1, 12)
        read = (a(x) @ b(x).transpose(1, 2)).softmax(-1) @ c(x)
        x = x + d(read)
        return (x + f(e(x).relu())).mean(1)


def unnamed():
    torch.manual_seed(0)
    return Classifier(classes(True), Unnamed(), functools.partial(SGD, lr=0.1), 8, 0)


def test_whatever_its_layers_are_called():
    around = {m.name for m in chosen(unnamed(), ["attention"])}
    assert around == {f"backbone.layers.{i}" for i in range(4)}


def test_a_pattern_is_of_the_whole_name_and_what_names_nothing_is_refused():
    learner = unnamed()
    assert [m.name for m in chosen(learner, ["*.1", "mlp"])] == [
        f"backbone.layers.{i}" for i in (1, 4, 5)
    ]
    for wrong in ("layers.1", "1", "conv"):
        with pytest.raises(UsageError, match=rf"'{wrong}' is no layer of this network"):
            chosen(learner, ["mlp", wrong])


# -- sizes --------------------------------------------------------------------------------------

OUT, D = 48, 64
COUNTS = {
    "lora": 8 * (OUT + D),
    "dora": 8 * (OUT + D) + OUT,
    "loha": 2 * 4 * (OUT + D),
    "ia3": OUT,
    "hra": 8 * D,
    "oft": D * (8 - 1) // 2,
    "psoft": 8 * 7 // 2 + 2 * 8,
    "fourierft": 200,
    "waveft": 200,
    "vera": 64 + OUT,
    "shira": 4 * (OUT + D),
    "miss": 8 * OUT,
    "road": OUT,
    "delora": 8 * (OUT + D) + 1,
    "c3a": OUT * D // 8,
    "osf": (OUT - 8) * (OUT + D + 1),
    "svft": OUT,
    "fish": 4 * (OUT + D),
    "lora_xs": 64,
    "lora_sb": 64,
    "frozen_a": 8 * OUT,
    "spectral": 8 * (OUT + D),
    "spectral_rotational": 8 * 7,
    "abba": 2 * 4 * (OUT + D),
    "mora": 20 * 20,
    "loldu": 8 + 1,
}
"""Of one layer of 48 x 64, by the papers' formulas."""


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_the_papers(name):
    maps = linear_maps("layer", nn.Linear(D, OUT))
    assert trial(maps, adapter(name).config)[0] == COUNTS[name]


@pytest.mark.parametrize(
    "name", ["lora", "oft", "hra", "psoft", "osf", "svft", "spectral", "fourierft"]
)
def test_a_budget_chooses_the_size_that_comes_nearest(name):
    maps = [m for i in range(3) for m in linear_maps(f"{i}", nn.Linear(D, OUT))]
    made = adapter(name)
    found = fitted(maps, made.config, made.size, 1000)
    assert found.count == trial(maps, found.config)[0]
    assert 0.5 <= found.count / 1000 <= 2.0
    for other in (found.size - 1, found.size + 1):
        setattr(found.config, made.size, other)
        try:
            count, change = trial(maps, found.config)
        except UsageError:
            continue
        if count and change <= START:
            assert max(count / 1000, 1000 / count) >= max(found.count / 1000, 1000 / found.count)


@pytest.mark.parametrize("wanted", [336, 350, 560, 1000])
def test_a_budget_chooses_a_size_that_starts_where_the_network_is(wanted):
    """HRA's reflections cancel in pairs alone."""
    maps, made = linear_maps("layer", nn.Linear(D, OUT)), adapter("hra")
    found = fitted(maps, made.config, made.size, wanted)
    assert found.size % 2 == 0
    assert trial(maps, found.config)[1] <= START


def test_a_budget_tries_no_size_far_beyond_what_it_asks_for(monkeypatch):
    """A rank of half a million takes gigabytes."""
    maps, made, seen = linear_maps("layer", nn.Linear(D, OUT)), adapter("lora"), []

    def watched(maps, config, apart=False):
        seen.append(config.r)
        return trial(maps, config, apart)

    monkeypatch.setattr("cl_bench.adapters.trial.trial", watched)
    found = fitted(maps, made.config, made.size, 450)  # 4 ranks train 448, no 5 % from 5 or 3
    assert found.size == 4
    found = fitted(maps, made.config, made.size, 390)  # between 336 and 448: nothing is near
    assert found.size in (3, 4)
    assert max(seen) <= 8


def test_a_share_is_of_the_network_without_heads():
    s = setting("lora", "vit", budget="20%")
    body = sum(p.numel() for n, p in s.learner.named_parameters() if not n.startswith("heads"))
    assert s.adapter.count == pytest.approx(0.2 * body, rel=0.3)
    assert s.adapter.metrics()["adapter"]["parameters"] == s.adapter.count


# -- the formulas of our own --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["svft", "spectral", "spectral_rotational", "loldu", "lora_xs"])
def test_what_trains_moves_the_weight_where_the_paper_says(name):
    torch.manual_seed(0)
    layer = nn.Linear(24, 16).double()
    W = layer.weight.detach().clone()
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    network = nn.ModuleDict({"a": layer})
    config = adapter(name).config
    attached = Attached(network, linear_maps("a", layer), config, "a")
    with torch.no_grad():
        for p in attached.parameters():
            p.add_(0.1 * torch.randn_like(p))
    acts = acting_weight(attached.layers["a"])
    change = U.t() @ (acts - W) @ Vt.t()
    assert change.norm() > 1e-3
    if name == "svft":  # singular vectors stay
        off = change - torch.diag(change.diagonal())
        assert off.abs().max() < 1e-5
    if name == "spectral_rotational":  # the spectrum stays
        torch.testing.assert_close(torch.linalg.svdvals(acts), S, atol=1e-5, rtol=0)
    if name in ("spectral_rotational", "lora_xs"):  # nothing beside the top directions moves
        assert change[8:].abs().max() < 1e-5
        assert change[:, 8:].abs().max() < 1e-5
    if name == "spectral":  # what is neither of the top outputs nor inputs stays
        assert torch.linalg.matrix_rank(acts - W, atol=1e-5) <= 16
        torch.testing.assert_close(acts - W, (acts - W) @ torch.eye(24, dtype=W.dtype))
    if name == "loldu":
        assert torch.linalg.matrix_rank(acts - W, atol=1e-5) <= 8


def test_mora_is_its_operators():
    """Pieces are rotated, go through one square and stand side by side (the paper's Eq. 9)."""
    torch.manual_seed(0)
    layer = nn.Linear(21, 30, bias=False).double()
    W = layer.weight.detach().clone()
    network = nn.ModuleDict({"a": layer})
    attached = Attached(
        network, linear_maps("a", layer), adapter("mora", config={"r": 2}).config, "a"
    )
    M = attached.layers["a"].M
    k = 10
    assert M.shape == (k, k)
    with torch.no_grad():
        M.copy_(torch.randn(k, k))
    x = torch.randn(3, 21, dtype=torch.float64)
    filled = torch.cat([x, x[:, :9]], 1).view(3, 3, k)
    out = []
    for j in range(3):
        angle = j / 10000 ** (torch.arange(0, k, 2, dtype=torch.float64) / k)
        first, second = filled[:, j, : k // 2], filled[:, j, k // 2 :]
        turned = torch.cat(
            [
                first * angle.cos() - second * angle.sin(),
                second * angle.cos() + first * angle.sin(),
            ],
            1,
        )
        out.append(turned @ M.t())
    expected = x @ W.t() + torch.cat(out, 1)
    torch.testing.assert_close(network["a"](x), expected, atol=1e-5, rtol=1e-5)


def test_fish_chooses_where_squared_gradients_are_largest():
    s = setting("fish", "bert", samples=8)
    task, learner = s.stream[0], s.learner
    learner.task = task
    names = {m.name: f"{m.name}.weight" for m in s.adapter.maps(learner)}
    batch = task.sample(8, learner.seed)
    gradients = learner.gradients(batch, per_sample=True)
    fisher = {n: gradients[p].square().mean(0).flatten() for n, p in names.items()}
    s.begin(0)
    chosen_ = {n: layer.seen for n, layer in s.adapter.attached.layers.items()}
    inside = torch.cat([fisher[n][i] for n, i in chosen_.items()])
    outside = torch.cat(
        [f[torch.isin(torch.arange(len(f)), chosen_[n], invert=True)] for n, f in fisher.items()]
    )
    assert inside.min() >= outside.max() * (1 - 1e-5)


def test_eva_starts_reading_the_leading_inputs():
    s = setting("eva", "bert")
    s.learner.task = s.stream[0]
    maps = s.adapter.maps(s.learner)
    moments = s.learner.tap(maps, [s.stream[0].sample(8, s.learner.seed)])
    s.begin(0)
    for m in maps:
        A = s.adapter.attached.layers[m.name].lora_A["task0"].weight.detach().double()
        energy = (A @ moments[m.name].gram * A).sum()
        assert energy == pytest.approx(
            float(torch.linalg.eigvalsh(moments[m.name].gram)[-8:].sum()), rel=1e-4
        )


# -- with strategies ----------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [lambda: ER(6), lambda: EWC(samples=6)])
def test_strategies_train_a_shared_adapter(trained):
    s = setting("lora", "bert", trained(), lifetime="shared", end="keep")
    for t in range(2):
        s.learn(t, steps=2)
    penalised = getattr(s.strategy.members[1], "information", None)
    assert penalised is None or any("lora_A" in name for name in penalised)


@pytest.mark.parametrize(
    ("other", "lifetime", "words"),
    [
        (GPM, "shared", "works on the network's own weights, in whose place lora trains others"),
        (Merge, "per_task", "works on the network's own weights"),
        (lambda: GDumb(20), "per_task", "works on the network's own weights"),
        (OLoRA, "per_task", "works on the network's own weights"),
        (EWC, "per_task", "would know nothing of"),
    ],
)
def test_strategies_on_the_weights_themselves_are_refused(other, lifetime, words):
    end = "keep" if lifetime == "shared" else "merge"
    with pytest.raises(UsageError, match=words):
        Together({"lora": adapter("lora", lifetime=lifetime, end=end), "other": other()})


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("lora", {"lifetime": "shared"}, "adapter.end=merge: an adapter that goes on"),
        ("lora", {"lifetime": "shared", "end": "reset"}, "adapter.end=reset"),
        ("pissa", {"end": "keep"}, "begins by changing the weights under it"),
        ("corda", {"end": "keep"}, "adapter.config.init_lora_weights=corda"),
        ("lora", {"samples": 8}, "adapter.samples=8: LoraConfig does not start from data"),
        ("fish", {"samples": None}, "adapter.samples=null: FISH starts from data"),
        ("ia3", {"budget": "1%"}, "adapter.budget=1%: IA3Config has one size"),
        ("lora", {"budget": "1"}, "adapter.budget=1: a whole number"),
        ("lora", {"budget": "200%"}, "adapter.budget=200%"),
        ("lora", {"size": "rank"}, "adapter.size=rank: LoraConfig has no such option"),
        ("lora", {"targets": []}, "adapter.targets"),
        ("lora", {"lifetime": "always"}, "adapter.lifetime=always"),
    ],
)
def test_options_that_cannot_be_are_refused(name, options, words):
    with pytest.raises((UsageError, Exception), match=words):
        adapter(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fourierft", {"config": {"init_weights": False}}, "before anything was learned"),
        ("spectral", {"config": {"r": 20}}, "r=20: a layer has 16 singular values"),
        ("psoft", {"budget": "90%"}, "no r of PsoftConfig trains about"),
        ("lora", {"budget": 1}, "the nearest is r=1"),
        ("lora", {"targets": ["conv"]}, "'conv' is no layer"),
    ],
)
def test_what_does_not_fit_the_network_is_refused_before_work(name, options, words):
    with pytest.raises(UsageError, match=words):
        setting(name, "bert", **options)


def test_a_convolution_is_adapted_and_one_that_peft_gets_wrong_is_refused():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten())
    learner = Classifier(classes(True), network, functools.partial(SGD, lr=0.1), 8, 0)
    made = adapter("lora", targets=["conv"])
    strategy = Together({"lora": made, "finetune": Finetune()})
    s = Setting(classes(True), learner, made, strategy)
    strategy.check(learner)
    before = s.outputs()
    s.learn(0)
    assert not torch.equal(s.outputs(), before)
    with pytest.raises(UsageError, match="changes outputs by"):
        adapter("oft", targets=["conv"], config={"oft_block_size": 9}).check(learner)


def test_the_yamls_are_many():
    assert len(NAMES) >= 39
    assert CLASSES == 3
