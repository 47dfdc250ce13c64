"""L2P, DualPrompt and CODA-Prompt: what is chosen, what learns, and that answers stand alone."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from toys import learn, mlp
from toys import make_learner as make_plain
from transformers_small import MADE, WIDTH, double, learned, make_learner, union

from cl_bench.blocks import blocks_of
from cl_bench.contracts import UsageError
from cl_bench.strategies.blocks.coda_prompt import CODAPrompt, further
from cl_bench.strategies.blocks.dualprompt import DualPrompt, by_block
from cl_bench.strategies.blocks.l2p import L2P

PROMPTS = ("coda_prompt", "l2p", "dualprompt")
every = pytest.mark.parametrize("name", PROMPTS)


@torch.no_grad()
def answers(learner, strategy, batch):
    return strategy.predict(learner, batch, None)


@every
def test_the_network_stays_bit_for_bit_and_prompts_and_heads_learn(name):
    strategy = MADE[name]()
    seen = []

    def after(learner, stream, t):
        seen.append({k: v.clone() for k, v in learner.weights().items()})

    learned(strategy, tasks=2, after=after)
    begun = make_learner(double(2)).weights()
    for key, value in begun.items():
        if key.startswith("backbone"):
            assert torch.equal(seen[-1][key], value), key
    assert not torch.equal(seen[0]["heads.0.weight"], begun["heads.0.weight"])
    assert torch.equal(seen[0]["heads.0.weight"], seen[1]["heads.0.weight"]), "logits: current"
    own = {k for k in seen[1] if k.startswith("extra")}
    assert own
    shared = {k for k in own & set(seen[0]) if "task0" not in k}
    assert all(not torch.equal(seen[0][k], seen[1][k]) for k in shared), "pool and G-prompts learn"
    old = {k for k in own if "task0" in k}
    assert all(torch.equal(seen[0][k], seen[1][k]) for k in old), "older prompts stay"


def test_an_answer_does_not_depend_on_the_batch_unless_the_published_layout_mixes_samples():
    found = {}
    for name, strategy in [
        *((name, MADE[name]()) for name in PROMPTS),
        ("published", DualPrompt(general_blocks=[0], expert_blocks=[1], layout="published")),
    ]:
        learner, stream = learned(strategy, tasks=2)
        batch = {k: v[::8] for k, v in union(stream).items()}
        together = answers(learner, strategy, batch)
        alone = torch.cat(
            [
                answers(learner, strategy, {k: v[i : i + 1] for k, v in batch.items()})
                for i in range(10)
            ]
        )
        order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
        mixed = answers(learner, strategy, {k: v[order] for k, v in batch.items()})
        found[name] = max(
            float((alone - together).abs().max()), float((mixed - together[order]).abs().max())
        )
        assert not torch.allclose(together, learner(batch)), "prompts say something"
    assert found.pop("published") > 1e-4
    assert max(found.values()) < 1e-12, found


def test_l2p_reads_the_prompts_of_the_nearest_keys_and_draws_those_near():
    strategy = L2P(size=4, length=2, top=2, pull=0.5)
    stream = double(2)
    learner = make_learner(stream)
    learner.begin(stream[0], strategy)
    batch = stream[0].train[torch.arange(7)]
    pool = learner.extras(strategy)["pool"]
    out = learner(batch)
    query = learner.features(batch)
    near = F.cosine_similarity(query[:, None], pool.keys[None], dim=2)
    best = near.argsort(1, descending=True)[:, :2]
    given = strategy.give(learner, query).positions
    assert torch.equal(given, torch.cat([pool.prompts[best[:, 0]], pool.prompts[best[:, 1]]], 1))
    loss = strategy.objective(learner, batch, out)
    pulled = near.gather(1, best).sum(1).mean()
    wanted = F.cross_entropy(out[:, :3], batch["y"]) - 0.5 * pulled
    torch.testing.assert_close(loss.mean, wanted)
    loss.mean.backward()
    chosen = best.unique()
    moved = pool.keys.grad.abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == chosen.tolist()
    with pytest.raises(UsageError, match=r"strategy\.top=5"):
        L2P(size=4, top=5)


def test_dualprompt_learns_a_tasks_own_prompts_and_answers_by_the_nearest_key():
    strategy = DualPrompt(general_blocks=[0], expert_blocks=[1], pull=0.3)
    learner, stream = learned(strategy, tasks=2)
    experts = [learner.extras(strategy)[f"task{t}"] for t in range(2)]
    batch = union(stream)
    with torch.no_grad():
        query = learner.features(batch)
        near = F.cosine_similarity(query[:, None], torch.stack([e.key for e in experts]), dim=2)
        given = strategy.give(learner, query)
    assert given.prefixes.keys() == {0, 1}
    chosen = near.argmax(1)
    wanted = torch.stack([e.prefixes for e in experts])[chosen]
    for i, part in enumerate(given.prefixes[1]):
        assert torch.equal(part, wanted[:, 0, i])
    for i, part in enumerate(given.prefixes[0]):
        assert torch.equal(part[3], learner.extras(strategy)["general"].prefixes[0, i])
    learner.begin(stream[1], strategy)
    learner.train()
    strategy.give(learner, query)
    torch.testing.assert_close(strategy._pull, 0.3 * near[:, 1].sum())


def test_a_new_task_of_dualprompt_begins_with_what_the_last_has_learned():
    strategy, stream = MADE["dualprompt"](), double(2)
    learner = make_learner(stream)
    learn(learner, strategy, stream[0], epochs=1)
    learner.begin(stream[1], strategy)
    first, second = (learner.extras(strategy)[f"task{t}"] for t in range(2))
    assert torch.equal(first.prefixes, second.prefixes)
    assert not torch.equal(first.key, second.key)
    assert not first.key.requires_grad
    assert not first.prefixes.requires_grad


def test_the_published_layout_is_that_of_a_reshape():
    """Kinds and samples of (block, K/V, sample) as the port reads them; batch of four."""
    kinds, samples = torch.meshgrid(torch.arange(2), torch.arange(4), indexing="ij")
    marks = (10 * kinds + samples).t()[:, None, :, None, None].double()  # (n, blocks, 2, L, d)
    wrong = torch.stack(by_block(marks, "published")[0], 1).flatten(1)
    assert wrong.tolist() == [[0, 1], [2, 3], [10, 11], [12, 13]]
    right = torch.stack(by_block(marks, "correct")[0], 1).flatten(1)
    assert right.tolist() == [[0, 10], [1, 11], [2, 12], [3, 13]]


def test_components_begin_orthonormal_and_are_weighed_by_the_query():
    strategy, stream = CODAPrompt(components=2, blocks=[1], length=2), double(2)
    learner = make_learner(stream)
    learn(learner, strategy, stream[0], epochs=1)
    learner.begin(stream[1], strategy)
    first, second = (learner.extras(strategy)[f"task{t}"] for t in range(2))
    for name in ("prompts", "keys", "attention"):
        old, new = getattr(first, name)[0], getattr(second, name)[0]
        torch.testing.assert_close(new @ new.T, torch.eye(2, dtype=new.dtype), atol=1e-6, rtol=0)
        torch.testing.assert_close(old @ new.T, torch.zeros_like(old @ new.T), atol=1e-6, rtol=0)
        assert not getattr(first, name).requires_grad
    query = learner.features(stream[1].train[torch.arange(5)])
    P, K, A = (
        torch.cat([getattr(one, name)[0] for one in (first, second)])
        for name in ("prompts", "keys", "attention")
    )
    alpha = F.cosine_similarity(query[:, None] * A, K[None], dim=2)
    keys, values = strategy.give(learner, query).prefixes[1]
    wanted = (alpha[:, :, None] * P).sum(1).view(5, 2, WIDTH)
    torch.testing.assert_close(torch.cat([keys, values], 1), wanted)


def test_where_dimensions_run_out_components_begin_at_random():
    rng = torch.Generator().manual_seed(0)
    found = further([torch.eye(3)[:1]], 4, 3, rng)
    torch.testing.assert_close(found[:2] @ found[:2].T, torch.eye(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[:2, 0], torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))


def test_codas_penalty_is_the_distance_from_orthonormality():
    strategy, stream = CODAPrompt(components=2, blocks=[0], length=2, orthogonality=0.5), double(1)
    learner = make_learner(stream)
    learner.begin(stream[0], strategy)
    own = learner.extras(strategy)["task0"]
    assert float(strategy.penalty(learner, {}, torch.empty(0))) < 1e-10
    with torch.no_grad():
        own.keys.mul_(2)  # K K^T = 4 I
    value = float(strategy.penalty(learner, {}, torch.empty(0)))
    assert value == pytest.approx(0.5 * 2 * 9 / 4)


@every
def test_what_cannot_be_prompted_is_refused_by_name(name):
    stream = double(1)
    with pytest.raises(UsageError, match="made of Linear"):
        MADE[name]().check(make_plain(stream, mlp()))
    learner = make_learner(stream)
    assert len(blocks_of(learner, "me")) == 2
    if name != "l2p":
        deep = CODAPrompt() if name == "coda_prompt" else DualPrompt()
        with pytest.raises(UsageError, match=r"the network has 2 blocks"):
            deep.check(learner)
    with pytest.raises(UsageError, match="block 1 is among"):
        DualPrompt(general_blocks=[0, 1], expert_blocks=[1])
    with pytest.raises(UsageError, match=r"strategy\.length=3"):
        CODAPrompt(length=3)
