"""InfLoRA, KeepLoRA and SD-LoRA on a tiny transformer: what pairs read, and what stays."""

import functools

import pytest
import torch
from dying import Killed, Mortal
from lightning import Trainer
from toys import make_engine, make_stream

from cl_bench.contracts import UsageError
from cl_bench.experiment import (
    AlignmentSettings,
    CheckpointSettings,
    EvalSettings,
    Identity,
    LoopSettings,
    conduct,
)
from cl_bench.models import ViT
from cl_bench.strategies.lowrank.inflora import InfLoRA, grown
from cl_bench.strategies.lowrank.keeplora import KeepLoRA
from cl_bench.strategies.lowrank.sd_lora import SDLoRA
from cl_bench.subspace import Moments
from runs import differences, final_weights

pytestmark = pytest.mark.usefixtures("no_pictures")

SHAPE, RANK, TASKS = (1, 8, 8), 2, 3
MAKE = {
    "inflora": functools.partial(InfLoRA, rank=RANK, threshold=0.7),
    "inflora-inputs": functools.partial(InfLoRA, rank=RANK, threshold=0.6, energy="inputs"),
    "keeplora": functools.partial(KeepLoRA, rank=RANK, weights=0.3, features=0.6),
    "sd_lora": functools.partial(SDLoRA, rank=RANK),
}
every = pytest.mark.parametrize("name", MAKE)
adam = functools.partial(torch.optim.Adam, lr=0.01)


def stream():
    return make_stream("class", TASKS, n=30, shape=SHAPE, subspace=6)


def make_learner(data):
    torch.manual_seed(1)
    return Mortal(data, ViT(SHAPE, patch=4, depth=1, width=16, heads=2), adam, 10, 0)


def copied(learner):
    return {name: w.detach().clone() for name, w in learner.weights().items()}


class Run:
    """Three tasks; before and after each the weights, and while it is learned the layers."""

    def __init__(self, name):
        self.strategy, data = MAKE[name](), stream()
        self.learner = make_learner(data)
        self.begun, self.trained, self.memory, self.weights = [], [], [], [copied(self.learner)]
        self.strategy.setup = self.around(self.strategy.setup, self.begun)
        self.strategy.consolidate = self.around(self.strategy.consolidate, self.trained, first=True)
        engine = make_engine(self.learner, self.strategy, epochs=3)
        for t in range(TASKS):
            engine.learn(data[t], self.strategy.plan(data, t))
            self.weights.append(copied(self.learner))
        self.data = data

    def around(self, hook, kept, first=False):
        def call(*arguments):
            if first:
                kept.append(self.now())
            hook(*arguments)
            if not first:
                kept.append(self.now())
                self.memory.append(dict(getattr(self.strategy, "memory", {})))

        return call

    def now(self):
        return {
            name: {k: v.detach().clone() for k, v in layer.state_dict().items()}
            for name, layer in self.strategy.layers.items()
        }


@pytest.fixture(scope="module")
def ran():
    return functools.cache(Run)


@every
def test_attention_learns_and_nothing_else_but_the_tasks_own_head(ran, name):
    run = ran(name)
    layers = set(run.trained[0])
    assert layers == {f"backbone.body.0.{part}" for part in ("query", "key", "value", "out")}
    for t in range(TASKS):
        before, after = run.weights[t], run.weights[t + 1]
        moved = {n for n in after if not torch.equal(before[n], after[n])}
        assert moved <= {f"{n}.weight" for n in layers} | {f"heads.{t}.weight"}
        assert f"heads.{t}.weight" in moved
        assert "backbone.body.0.value.weight" in moved


@pytest.mark.parametrize("name", [n for n in MAKE if n != "sd_lora"])
def test_what_old_tasks_have_read_is_read_by_no_pair_and_by_no_change(ran, name):
    run = ran(name)
    for t in range(TASKS):
        for layer, M in run.memory[t].items():
            A = run.trained[t][layer]["A"]
            assert torch.equal(A, run.begun[t][layer]["A"])
            W, V = (run.weights[i][f"{layer}.weight"].double() for i in (t, t + 1))
            assert M.shape[1] < 16
            assert (A.double() @ M).norm() <= 1e-5 * A.norm()
            assert ((V - W) @ M).norm() <= 1e-5 * max(float(W.norm()), 1.0)
            assert torch.linalg.matrix_rank(V - W, atol=1e-5) <= RANK
            told = run.strategy.metrics()[layer]
            assert told["lora_overlap"] <= 1e-5
            assert told["rank"] == run.strategy.memory[layer].shape[1] >= M.shape[1]
    assert all(run.memory[TASKS - 1])
    # The control: without the memory, A reads what old tasks read.
    layer = next(iter(run.memory[2]))
    free = MAKE[name]()
    if name == "keeplora":
        free.weights = 0.0
    run.learner.begin(run.data[2], free)
    A, M = free.layers[layer].A.double(), run.memory[2][layer]
    assert (A @ M).norm() > 1e-2 * A.norm()
    free.release(run.learner)


@pytest.mark.parametrize("energy", ["official", "inputs"])
def test_inflora_begins_where_new_inputs_have_most(energy):
    data = stream()
    learner, strategy = make_learner(data), InfLoRA(rank=RANK, energy=energy)
    learner.begin(data[0], strategy)
    layer = "backbone.body.0.query"
    (m,) = [m for m in strategy.maps(learner) if m.name == layer]
    C = learner.tap([m], [data[0].sample(1000, 0)])[layer].gram
    U = torch.linalg.eigh(C).eigenvectors[:, -RANK:]
    A = strategy.layers[layer].A.double() * 3**0.5
    torch.testing.assert_close(A @ A.t(), torch.eye(RANK).double(), atol=1e-5, rtol=0)
    assert (A - (A @ U) @ U.t()).norm() < 1e-3
    assert not strategy.layers[layer].B.any()
    strategy.release(learner)


def dual(matrices, thresholds):
    """DualGPM's two forms as published, on C's: the projection after each task."""
    basis, removes, found = None, True, []
    for C, eps in zip(matrices, thresholds, strict=True):
        total = torch.linalg.svdvals(C).square().sum()
        if basis is None:
            U, S, _ = torch.linalg.svd(C)
            basis = U[:, : max(int((S.square().cumsum(0) / total < eps).sum()), 1)]
        else:
            inside = basis @ basis.t() @ C
            U, S, _ = torch.linalg.svd(C - inside if removes else inside)
            left, r = S.square().sum() / total, 0
            while r < len(S) and (left > 1 - eps if removes else left >= 1 - eps):
                left, r = left - S[r].square() / total, r + 1
            if removes:
                basis = torch.cat([basis, U[:, :r]], 1)
            elif r:
                less = basis - U[:, :r] @ (U[:, :r].t() @ basis)
                basis = torch.linalg.svd(less)[0][:, : basis.shape[1] - r]
        d = len(basis)
        if removes and basis.shape[1] > d / 2:
            basis, removes = torch.linalg.svd(basis)[0][:, basis.shape[1] :], False
        P = basis @ basis.t()
        found.append(P if removes else torch.eye(d).double() - P)
    return found


def test_one_basis_is_both_forms_of_dual_gpm():
    rng = torch.Generator().manual_seed(0)
    X = [torch.randn(12, 4, generator=rng).double() for _ in range(4)]
    C = [x @ x.t() + 1e-3 * torch.eye(12).double() for x in X]
    eps, M, ranks = [0.9, 0.93, 0.96, 0.99], None, []
    for c, e, P in zip(C, eps, dual(C, eps), strict=True):
        inputs = Moments(12)
        inputs.add(c)
        M = grown(M, inputs, e)
        torch.testing.assert_close(M @ M.t(), P, atol=1e-8, rtol=0)
        ranks.append(M.shape[1])
    assert ranks[0] < 6 < ranks[-1]


def test_keeplora_begins_as_the_gradient_beside_what_weights_knew_and_changes_nothing():
    data = stream()
    learner, strategy = make_learner(data), KeepLoRA(rank=RANK, weights=0.3)
    before, batch = copied(learner), data[0].sample(1000, 0)
    learner.eval()
    with torch.no_grad():
        said = learner(batch)
    learner.begin(data[0], strategy)
    with torch.no_grad(), learner.evaluating():
        assert torch.equal(learner(batch), said)
    strategy.release(learner)
    learner.begin(data[0], strategy)
    pairs = {n: (layer.B.detach(), layer.A) for n, layer in strategy.layers.items()}
    assert all(torch.equal(b, strategy.layers[n].start) for n, (b, _) in pairs.items())
    assert next(iter(strategy.layers.values())).scale == 1 / RANK
    fresh = make_learner(data)
    fresh.begin(data[0], Plain())
    gradients = fresh.gradients(batch)
    for name, (B, A) in pairs.items():
        W, G = before[f"{name}.weight"].double(), gradients[f"{name}.weight"].double()
        _, S, Vt = torch.linalg.svd(W)
        kept = max(int((S.square().cumsum(0) / S.square().sum() < 0.3).sum()), 1)
        V = Vt[:kept].t()
        torch.testing.assert_close(strategy.memory[name] @ strategy.memory[name].t(), V @ V.t())
        U, s, Vt = torch.linalg.svd(G - G @ V @ V.t())
        wanted = (U[:, :RANK] * s[:RANK]) @ Vt[:RANK]
        torch.testing.assert_close((B @ A).double(), wanted, atol=1e-6, rtol=1e-3)
    strategy.release(learner)


class Plain(KeepLoRA):
    """Trains all weights: gradients are there to be asked for."""

    def setup(self, learner, task):
        self.classes = task.classes


def test_sd_lora_keeps_directions_to_the_bit_and_learns_their_strengths(ran):
    run = ran("sd_lora")
    first = {n: w for n, w in run.weights[0].items() if n.startswith("backbone.body")}
    for t in range(TASKS):
        for layer, end in run.trained[t].items():
            begin = run.begun[t][layer]
            for old in ("old_A", "old_B") if t else ():
                assert torch.equal(begin[old], end[old])
                if t == 2:  # the first task's lie in front, as the second had them
                    here, there = end[old], run.trained[1][layer][old]
                    cut = here[:RANK] if old == "old_A" else here[:, :RANK]
                    assert torch.equal(cut, there)
            assert torch.equal(begin["base_layer.weight"], first[f"{layer}.weight"])
            assert torch.equal(begin["strengths"], torch.full((t + 1,), 0.8))
            assert (end["strengths"] != 0.8).all()
            # Frobenius norms and one number for each direction, by the formula.
            W, pairs = first[f"{layer}.weight"].double(), []
            for s in range(t):
                b, a = (run.trained[s][layer][k].double() for k in ("B", "A"))
                pairs.append(b @ a / (b.norm() * a.norm()))
            pairs.append(end["B"].double() @ end["A"].double())
            for strength, pair in zip(end["strengths"].double(), pairs, strict=True):
                W = W + strength * pair
            found = run.weights[t + 1][f"{layer}.weight"].double()
            torch.testing.assert_close(found, W, atol=1e-6, rtol=1e-5)
    one = {tuple(end["strengths"].tolist()) for end in run.trained[2].values()}
    assert one == {tuple(run.strategy.strengths)}


@every
def test_a_samples_answer_does_not_depend_on_its_batch(ran, name):
    run = ran(name)
    batch = {k: torch.cat([t.everything[k] for t in run.data]) for k in ("x", "y", "task")}
    run.learner.eval()
    with torch.no_grad():
        whole = run.strategy.predict(run.learner, batch, None)
        for i in (0, 40, 80):
            one = {k: v[i : i + 1] for k, v in batch.items()}
            torch.testing.assert_close(
                run.strategy.predict(run.learner, one, None), whole[i : i + 1], atol=1e-5, rtol=0
            )


def conducted(directory, name, dies_at=-1, resume=False):
    data = stream()
    learner = make_learner(data)
    learner.dies_at = dies_at
    options = {"enable_checkpointing": False, "enable_progress_bar": False, "logger": False}
    conduct(
        data,
        MAKE[name](),
        learner,
        functools.partial(
            Trainer, accelerator="cpu", max_epochs=2, enable_model_summary=False, **options
        ),
        Identity("toy", name, "seed: 0\n", "python -m cl_bench"),
        loop=LoopSettings(0, 10),
        evaluation=EvalSettings(),
        alignment=AlignmentSettings(enabled=False),
        checkpoint=CheckpointSettings(True, 2, 2),
        run_dir=directory,
        resume=resume,
    )
    return learner


@pytest.mark.parametrize("name", ["inflora", "keeplora", "sd_lora"])
def test_killed_inside_the_third_task_it_goes_on_bit_for_bit(tmp_path, name):
    learner = conducted(tmp_path / "whole", name)
    with pytest.raises(Killed):
        conducted(tmp_path / "killed", name, dies_at=learner.batches - 2)
    newest = max(p.name for p in (tmp_path / "killed" / "checkpoints").glob("*.pt"))
    assert newest.startswith("task0002")
    assert not newest.endswith("step000000000.pt")
    conducted(tmp_path / "killed", name, resume=True)
    assert differences(tmp_path / "whole", tmp_path / "killed") == []
    assert final_weights(tmp_path / "whole") == final_weights(tmp_path / "killed")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 17}, "strategy.rank=17: layer backbone.body.0.query is a matrix of 16 x 16"),
        ({"targets": ["keys"]}, r"strategy.targets=\[keys\]: 'keys' is no layer of this network"),
    ],
)
def test_what_does_not_fit_the_network_is_refused_before_work(options, said):
    with pytest.raises(UsageError, match=said):
        InfLoRA(**options).check(make_learner(stream()))
