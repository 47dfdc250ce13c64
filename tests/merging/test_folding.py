"""Folding models one after the other, against all of them at once."""

import ast
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from models import MATRICES, SHAPES, close, counts, flat, folded_over, model, seeds, task_vectors

from cl_bench.merging import (
    RULES,
    Average,
    Dare,
    Dop,
    FrankWolfe,
    IsoC,
    IsoCts,
    MagMax,
    Opcm,
    Ota,
    TaskArithmetic,
    Ties,
    TsvM,
    drop,
    fold,
    merge,
    update,
)
from cl_bench.merging.ties import smallest

quick = settings(deadline=None, max_examples=15)

ORDERLESS = [
    Average(),
    TaskArithmetic(),
    Ties(),
    Ties(how="mean"),
    MagMax(),
    IsoC(),
    IsoCts(),
    TsvM(),
]


def stacked(vectors, name):
    return torch.stack([v[name] for v in vectors])


def at_once(rule, vectors):
    """What the rule is by its formula, from all task vectors."""
    found = {}
    if isinstance(rule, Ties):
        k = len(flat(vectors[0])) - int(len(flat(vectors[0])) * rule.top)
        thresholds = [flat(v).abs().kthvalue(k).values for v in vectors]
    for name in vectors[0]:
        tau = stacked(vectors, name)
        if isinstance(rule, Average):
            found[name] = tau.mean(0)
        elif isinstance(rule, TaskArithmetic):
            found[name] = 0.3 * tau.sum(0)
        elif isinstance(rule, MagMax):
            found[name] = 0.5 * tau.gather(0, tau.abs().argmax(0, keepdim=True))[0]
        elif isinstance(rule, Ties):
            kept = torch.stack([t * (t.abs() >= c) for t, c in zip(tau, thresholds, strict=True)])
            agree = kept * (kept.sign() == kept.sum(0).sign())
            found[name] = 0.3 * agree.sum(0)
            if rule.how == "mean":
                found[name] /= (agree != 0).sum(0).clamp(min=1)
    return found


@pytest.mark.parametrize("rule", ORDERLESS[:5], ids=lambda r: f"{type(r).__name__}")
@given(seed=seeds, count=counts)
@quick
def test_a_fold_is_the_formula_at_once(rule, seed, count):
    vectors = task_vectors(seed, count)
    close(update(rule, folded_over(rule, vectors), MATRICES), at_once(rule, vectors))


@pytest.mark.parametrize("rule", ORDERLESS, ids=lambda r: type(r).__name__)
@given(seed=seeds)
@quick
def test_order_does_not_matter(rule, seed):
    vectors = task_vectors(seed, 3)
    one, other = (update(rule, folded_over(rule, v), MATRICES) for v in (vectors, vectors[::-1]))
    close(one, other, atol=1e-9)


def test_order_matters_to_opcm_and_dop():
    """The control of the test above."""
    vectors = task_vectors(0, 3)
    for rule in (Opcm(), Dop()):
        one, other = (
            flat(update(rule, folded_over(rule, v), MATRICES)) for v in (vectors, vectors[::-1])
        )
        assert (one - other).norm() > 0.05 * one.norm()


@pytest.mark.parametrize("name", RULES)
def test_what_folds_has_a_constant_size_and_the_others_grow(name):
    rule = RULES[name]()
    sizes = []
    for count in (1, 2, 4):
        vectors = task_vectors(3, count)
        moments = [{n: v.square() for n, v in w.items()} for w in vectors]
        sizes.append(folded_over(rule, vectors, moments).bytes["square"])
    assert (sizes[0] == sizes[2]) == rule.folds, sizes
    if not rule.folds:
        assert sizes[2] == 4 * sizes[0]


@pytest.mark.parametrize(
    "rule",
    [
        Average(),
        TaskArithmetic(scale=1.0),
        MagMax(scale=1.0),
        Opcm(),
        Dop(),
        TsvM(),
        Ties(scale=1.0, top=1.0),
        Ties(scale=1.0, top=1.0, how="mean"),
        Dare(inner=TaskArithmetic(scale=1.0), drop=0.0),
    ],
    ids=lambda r: type(r).__name__,
)
@given(seed=seeds)
@quick
def test_one_model_is_its_own_merge(rule, seed):
    base, (tau,) = model(seed), task_vectors(seed, 1)
    theta = {name: base[name] + tau[name] for name in base}
    close(merge(rule, base, [theta], MATRICES), theta, atol=1e-11)


def test_ota_of_one_model_is_that_model():
    (tau,) = task_vectors(1, 1)
    found = update(
        Ota(), folded_over(Ota(), [tau], [{n: v.square() for n, v in model(5).items()}]), MATRICES
    )
    close(found, tau)


@pytest.mark.parametrize("name", RULES)
def test_models_that_did_not_move_add_nothing(name):
    still = {n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()}
    rule = RULES[name]()
    found = update(rule, folded_over(rule, [still, still], [still, still]), MATRICES)
    assert flat(found).abs().max() == 0


def test_a_fold_leaves_what_it_was_given():
    vectors = task_vectors(2, 3)
    for rule in (Average(), Ties(), MagMax(), Opcm(), IsoCts(), Dop()):
        first = folded_over(rule, vectors[:2])
        kept = {n: {k: v.clone() for k, v in f.items()} for n, f in first.folds.items()}
        fold(rule, first, vectors[2], MATRICES)
        for name, one in kept.items():
            close(dict(first.folds[name]), one, atol=0)


# -- TIES ------------------------------------------------------------------------------------------


def test_adding_the_merge_to_itself_grows_and_the_fold_does_not():
    """The control: TIES of (merge, newest) with the sum, step after step."""
    tau = task_vectors(0, 1)[0]
    rule = Ties(scale=1.0, top=1.0, how="mean")
    again, norms = tau, []
    for _ in range(5):
        both = update(rule, folded_over(rule, [again, tau]), MATRICES)
        again = {n: again[n] + 0.5 * both[n].view_as(again[n]) for n in again}
        norms.append(float(flat(again).norm()))
    assert norms[-1] > 2 * norms[0]
    close(update(rule, folded_over(rule, [tau] * 6), MATRICES), tau)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=seeds)
@settings(deadline=None, max_examples=25)
def test_the_kth_smallest_of_chunks_is_that_of_the_whole(dtype, seed):
    rng = torch.Generator().manual_seed(seed)
    scale = 10 ** (12 * torch.rand((), generator=rng) - 6)
    values = (scale * torch.randn(301, generator=rng, dtype=dtype)).abs()
    values[:40] = values[7]  # ties
    values[50:60] = 0
    k = int(torch.randint(1, 302, (), generator=rng))
    chunks = values.split([100, 1, 200])
    assert smallest(lambda: chunks, k) == float(values.kthvalue(k).values)


# -- DARE, MagMax, OTA -----------------------------------------------------------------------------


def test_dares_masks_keep_the_mean():
    tau = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rng = torch.Generator().manual_seed(0)
    found = torch.stack([drop(tau, 0.5, rng) for _ in range(1000)])
    assert ((found == 0) | torch.isclose(found, 2 * tau)).all()
    error = (found.mean(0) - tau).abs()
    assert (error < 4 * tau.abs() / 1000**0.5).all()  # an entry's standard deviation is |tau|
    assert 0.48 < float((found == 0).double().mean()) < 0.52


def test_dare_depends_on_the_seed_the_weight_and_the_models_place_alone():
    vectors = task_vectors(4, 2)
    one, again, other = (
        flat(update(Dare(seed=s), folded_over(Dare(seed=s), vectors), MATRICES)) for s in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@given(seed=seeds, count=counts)
@quick
def test_magmax_takes_entries_as_they_are_and_keeps_signs(seed, count):
    vectors = task_vectors(seed, count)
    rule = MagMax(scale=1.0)
    found = update(rule, folded_over(rule, vectors), MATRICES)
    turned = [{n: -v for n, v in w.items()} for w in vectors]
    for name in found:
        assert (found[name] == stacked(vectors, name)).any(0).all()
    close(
        {n: -v for n, v in update(rule, folded_over(rule, turned), MATRICES).items()}, found, atol=0
    )


@given(seed=seeds)
@quick
def test_ota_of_equal_moments_is_the_mean_and_one_factor_does_not_matter(seed):
    vectors = task_vectors(seed, 3)
    same = [{n: v.square() for n, v in model(seed).items()}] * 3
    close(
        update(Ota(), folded_over(Ota(), vectors, same), MATRICES),
        update(Average(), folded_over(Average(), vectors), MATRICES),
    )
    moments = [{n: v.square() for n, v in model(seed + t).items()} for t in range(3)]
    raw = Ota(moments="raw")
    tenfold = [{n: 10 * v for n, v in m.items()} for m in moments]
    close(
        update(raw, folded_over(raw, vectors, moments), MATRICES),
        update(raw, folded_over(raw, vectors, tenfold), MATRICES),
        atol=1e-10,
    )
    power = Ota(power=0.0)
    close(
        update(power, folded_over(power, vectors, moments), MATRICES),
        update(Average(), folded_over(Average(), vectors), MATRICES),
    )


def test_a_models_gradients_scale_counts_unless_moments_are_normalised():
    vectors = task_vectors(6, 2)
    moments = [{n: v.square() for n, v in model(t).items()} for t in range(2)]
    louder = [moments[0], {n: 1e4 * v for n, v in moments[1].items()}]
    for rule, equal in ((Ota(moments="raw"), False), (Ota(), True)):
        one, other = (
            flat(update(rule, folded_over(rule, vectors, m), MATRICES)) for m in (moments, louder)
        )
        assert torch.allclose(one, other) == equal
    with pytest.raises(ValueError, match="moments, which are missing"):
        folded_over(Ota(), vectors)


def test_the_rank_one_form_keeps_both_margins():
    from cl_bench.merging.ota import factored

    v = model(0)["first"].square()
    for dim in (0, 1):
        torch.testing.assert_close(factored(v).sum(dim), v.sum(dim))
    assert torch.linalg.matrix_rank(factored(v)) == 1


# -- Frank-Wolfe -----------------------------------------------------------------------------------


@given(seed=seeds)
@quick
def test_frank_wolfe_goes_to_the_best_vertex_of_a_linear_loss_in_one_whole_step(seed):
    g, models = model(seed), task_vectors(seed, 4)
    best = min(models, key=lambda m: float(flat(g) @ flat(m)))
    found = FrankWolfe(iterations=1, step=1.0, scale=1.0).merge(
        model(seed + 1), models, lambda w: g
    )
    close(found, best)


@pytest.mark.parametrize("granularity", ["model", "weight"])
@pytest.mark.parametrize("oracle", ["inner", "cosine"])
def test_frank_wolfe_stays_in_the_convex_hull(granularity, oracle):
    models, target = task_vectors(1, 3), model(8)
    start = {n: sum(m[n] for m in models) / 3 for n in models[0]}
    rule = FrankWolfe(10, 1.0, 1.0, oracle, granularity)
    found = rule.merge(start, models, lambda w: {n: w[n] - target[n] for n in w})
    for name in found:
        corners = torch.stack([m[name].flatten() for m in models], 1)
        system = torch.cat([corners, torch.ones(1, 3, dtype=torch.float64)])
        wanted = torch.cat([found[name].flatten(), torch.ones(1, dtype=torch.float64)])
        weights = torch.linalg.lstsq(system, wanted[:, None]).solution[:, 0]
        torch.testing.assert_close(system @ weights, wanted)
        assert (weights > -1e-9).all()


# -- options, and what the room imports ------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Ties(top=0.0), "top=0.0"),
        (lambda: Dare(drop=1.0), "drop=1.0"),
        (lambda: Opcm(alpha=1.5), "alpha=1.5"),
        (lambda: IsoCts(common=-0.1), "common=-0.1"),
        (lambda: Dop(stability=2), "stability=2"),
        (lambda: FrankWolfe(step=0.0), "step=0.0"),
    ],
)
def test_an_option_out_of_range_is_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_other_weights_than_before_are_named():
    vectors = task_vectors(0, 2)
    with pytest.raises(ValueError, match=r"other weights than before: \['bias'\]"):
        folded_over(Average(), [vectors[0], {n: v for n, v in vectors[1].items() if n != "bias"}])


def test_the_room_imports_torch_and_nothing_else():
    room = Path(__file__).parents[2] / "cl_bench/merging"
    allowed = {"torch", "abc", "collections", "dataclasses", "hashlib", "math", "typing"}
    for path in room.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] in allowed or node.module.startswith(
                    "cl_bench.merging"
                ), path
            elif isinstance(node, ast.Import):
                assert {a.name.split(".")[0] for a in node.names} <= allowed, path
