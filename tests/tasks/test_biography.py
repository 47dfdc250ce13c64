"""The biography world: who lives there, what is written and asked, and who is asked about when."""

import itertools
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from toys import make_stream

from cl_bench.contracts import IGNORE, UsageError
from cl_bench.learners import Causal
from cl_bench.tasks.biography import Biography
from cl_bench.tasks.biography.packing import Biographies
from cl_bench.tasks.biography.people import draw, populate
from cl_bench.tasks.biography.pools import ATTRIBUTES, FULL_SIZES, NAME_SIZES, names, values
from cl_bench.tasks.biography.templates import PER_ATTRIBUTE, QUESTIONS, statements
from cl_bench.tasks.biography.vocabulary import END, HOLE, PAD, Vocabulary, pieces

CONFIGS = Path(__file__).parents[2] / "conf/stream/biography"
PRETRAIN = {"steps": 3, "batch_size": 4, "length": 64}


def make(**options):
    options = {"people": 60, "new_people": 20, "strangers": 10, "pretrain": PRETRAIN} | options
    return Biography(**options)


def full_name(stream, person):
    first, middle, last = (
        pool[i]
        for pool, i in zip(names(NAME_SIZES), stream.world.people.names[person], strict=True)
    )
    return f"{first} {middle} {last}"


def value_text(stream, person, attribute):
    pool = values(attribute, FULL_SIZES[attribute])
    return pool[stream.world.people.values[attribute][person]]


# -- pools and templates ----------------------------------------------------------------------


def test_pools_have_the_published_sizes_and_distinct_values():
    for attribute, size in FULL_SIZES.items():
        pool = values(attribute, size)
        assert len(set(pool)) == size
    assert FULL_SIZES["birthday"] == 67_200
    first, middle, last = names(NAME_SIZES)
    assert (len(first), len(middle), len(last)) == NAME_SIZES == (400, 400, 1000)
    assert not set(first) & set(middle)
    assert len({*first, *middle}) == 800
    assert len(set(last)) == 1000
    assert not set(values("birth_city", 200)) & set(values("company_city", 200))


def test_every_attribute_has_fifty_templates_and_one_question():
    assert PER_ATTRIBUTE >= 50
    for attribute in ATTRIBUTES:
        said = statements(attribute, PER_ATTRIBUTE)
        assert len(set(said)) == PER_ATTRIBUTE
        assert all(s.startswith("{name}") and s.endswith(".") for s in said)
        assert all(s.count("{value}") == 1 == s.count("{name}") for s in said)
        assert any(s.endswith("{value}.") for s in said)
        assert any(not s.endswith("{value}.") for s in said)
        assert QUESTIONS[attribute].endswith("\nAnswer:")


@pytest.mark.parametrize("whole", [True, False])
def test_a_prompt_and_its_answer_are_tokenised_alike_apart_and_together(whole):
    vocabulary = make(whole_values=whole).world.vocabulary
    for attribute in ATTRIBUTES:
        prompt = QUESTIONS[attribute].replace("{name}", "Bela Thorbert Ashley")
        answer = f" {values(attribute, 5)[3]}"
        words = Vocabulary([prompt, answer])
        assert words.encode(prompt) + words.encode(answer) == words.encode(prompt + answer)
        if whole:
            assert len(vocabulary.encode(answer)) == 1
        else:
            assert len(vocabulary.encode(answer)) == len(pieces(answer))


# -- people -----------------------------------------------------------------------------------


def test_names_are_unique_and_values_do_not_depend_on_how_many_people_there_are():
    few = populate(3, 500, NAME_SIZES, FULL_SIZES)
    many = populate(3, 9000, NAME_SIZES, FULL_SIZES)
    assert len(torch.unique(many.names, dim=0)) == 9000
    assert torch.equal(few.names, many.names[:500])
    assert torch.equal(few.female, many.female[:500])
    for attribute in ATTRIBUTES:
        assert torch.equal(few.values[attribute], many.values[attribute][:500])


def test_names_stay_unique_where_names_are_scarce():
    people = populate(0, 50, (5, 5, 5), FULL_SIZES)
    assert len(torch.unique(people.names, dim=0)) == 50


def test_company_city_is_a_function_of_company_and_the_rest_is_uniform_and_independent():
    people = populate(0, 40_000, NAME_SIZES, FULL_SIZES)
    pairs = torch.stack([people.values["company"], people.values["company_city"]], 1)
    assert len(torch.unique(pairs, dim=0)) == len(torch.unique(pairs[:, 0])) == 263
    free = [a for a in ATTRIBUTES if a != "company_city"]
    coarse = {a: people.values[a] * 5 // FULL_SIZES[a] for a in free}
    for attribute in free:
        counts = torch.bincount(coarse[attribute], minlength=5)[:5].double()
        size = FULL_SIZES[attribute]
        cells = torch.bincount(torch.arange(size) * 5 // size, minlength=5).double() / size
        assert float(((counts - 40_000 * cells) ** 2 / (40_000 * cells)).sum()) < 20  # chi2, 4 df
    for one, other in itertools.combinations(free, 2):
        table = torch.zeros(5, 5).double()
        table.index_put_((coarse[one], coarse[other]), torch.ones(1).double(), accumulate=True)
        expected = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / 40_000
        assert float(((table - expected) ** 2 / expected).sum()) < 45  # chi2, 16 df


def test_draws_are_uniform_and_keep_their_beginning():
    assert torch.equal(draw(1, "x", 10, 7), draw(1, "x", 5000, 7)[:10])
    assert not torch.equal(draw(1, "x", 10, 1000), draw(2, "x", 10, 1000))
    assert draw(1, "x", 0, 7).shape == (0,)


# -- biographies ------------------------------------------------------------------------------


def test_five_biographies_of_a_person_differ_in_every_sentence_and_in_their_order():
    stream = make()
    templates, orders = stream.world.choices(60, 5, "fixed")
    assert templates.shape == orders.shape == (60, 5, 6)
    for person in range(60):
        for kind in range(6):
            assert len(set(templates[person, :, kind].tolist())) == 5
        assert len({tuple(o) for o in orders[person].tolist()}) == 5
        assert all(sorted(o) == list(range(6)) for o in orders[person].tolist())
    spread = torch.bincount(stream.world.choices(2000, 1, "x")[0].flatten(), minlength=50)
    assert len(spread) == 50
    assert int(spread.min()) > 160  # of 240 expected


def test_a_biography_names_its_person_six_times_and_every_value_verbatim():
    stream = make()
    documents = stream.pretraining.batches.__self__
    tokens, lengths = documents.documents(0)
    texts = [stream.text(t) for t in tokens.split(lengths.tolist())]
    assert len(texts) == 60 * 5
    for number in (0, 4, 151, 299):
        person, text = number // 5, texts[number]
        assert text.startswith(f" {full_name(stream, person)}")
        assert text.endswith("<end>")
        assert text.count(full_name(stream, person)) == 6
        assert text.count("<end>") == 1
        for attribute in ATTRIBUTES:
            assert value_text(stream, person, attribute) in text


def test_biographies_of_one_world_are_the_same_whatever_else_is_made():
    one, other = make(), make(num_tasks=3, people=60)
    assert torch.equal(
        one.pretraining.batches.__self__.documents(0)[0],
        other.pretraining.batches.__self__.documents(0)[0],
    )
    assert one.pretraining.identity == other.pretraining.identity
    changed = make(world_seed=1), make(templates=20), make(variants=None), make(strangers=11)
    assert len({s.pretraining.identity for s in (one, *changed)}) == 5


@pytest.mark.parametrize("variants", [5, None])
def test_packing_keeps_every_document_whole_and_ignores_what_follows_its_end(variants):
    documents = Biographies(make().world, 40, variants, length=50, batch_size=7)
    inputs, labels = documents.pieces(epoch=2, seed=0)
    assert inputs.shape == labels.shape
    assert inputs.shape[1] == 50
    text, wanted = inputs.flatten(), labels.flatten()
    stands = text != PAD
    assert int(stands.sum()) == len(documents.documents(2)[0])
    assert not stands[int(stands.sum()) :].any()  # padding stands at the very end only
    assert (wanted[~stands] == IGNORE).all()
    after_end = torch.cat([torch.tensor([False]), text[:-1] == END])
    assert (wanted[after_end] == IGNORE).all()
    assert torch.equal(wanted[stands & ~after_end], text[stands & ~after_end].long())
    tokens, lengths = documents.documents(2)
    written = sorted(map(tuple, (t.tolist() for t in tokens.split(lengths.tolist()))))
    ends = (text == END).nonzero().squeeze(1) + 1
    read = text[: int(ends[-1])].tensor_split(ends[:-1])
    assert sorted(tuple(t.tolist()) for t in read) == written


def test_every_epoch_has_its_own_order_and_fresh_biographies_where_variants_are_not_fixed():
    fixed, fresh = (make(variants=v).pretraining.batches.__self__ for v in (5, None))
    assert torch.equal(fixed.documents(0)[0], fixed.documents(1)[0])
    assert not torch.equal(fixed.pieces(0, 0)[0], fixed.pieces(1, 0)[0])
    assert not torch.equal(fixed.pieces(0, 0)[0], fixed.pieces(0, 1)[0])
    assert torch.equal(fixed.pieces(1, 5)[0], fixed.pieces(1, 5)[0])
    assert len(fresh.documents(0)[1]) == 60
    assert not torch.equal(fresh.documents(0)[0], fresh.documents(1)[0])
    assert torch.equal(fresh.documents(1)[0], fresh.documents(1)[0])


def test_batches_go_on_epoch_after_epoch():
    stream = make(pretrain={"steps": 3, "batch_size": 1000, "length": 64})
    batches = stream.pretraining.batches(0)
    one, two = next(batches), next(batches)
    assert set(one) == {"input_ids", "labels", "attention_mask"}
    assert one["input_ids"].dtype == one["labels"].dtype == torch.int64
    assert not torch.equal(one["input_ids"], two["input_ids"])
    assert torch.equal(one["attention_mask"], (one["input_ids"] != PAD).long())


# -- questions --------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_questions_read_well_and_label_exactly_the_answer_and_the_end(whole):
    stream = make(whole_values=whole)
    data = stream[0].test
    assert len(data) == 30 * 6
    assert len({t.shape[1] for n, t in data.tensors.items() if n != "kind"}) == 1
    for row in (0, 7, 14, 100, 179):
        person, kind = 30 + row // 6, row % 6
        attribute = ATTRIBUTES[kind]
        tokens, labels = data.tensors["input_ids"][row], data.tensors["labels"][row]
        answer = f" {value_text(stream, person, attribute)}"
        question = QUESTIONS[attribute].replace("{name}", full_name(stream, person))
        assert stream.text(tokens) == f"{question}{answer}<end>"
        assert stream.text(labels[labels != IGNORE]) == f"{answer}<end>"
        learned = labels != IGNORE
        assert torch.equal(labels[learned], tokens[learned])
        assert int(learned.sum()) == len(stream.world.vocabulary.encode(answer)) + 1
        assert torch.equal(data.tensors["attention_mask"][row], (tokens != PAD).long())
        assert int(data.tensors["kind"][row]) == kind


def test_probe_begins_a_biography_and_scores_its_value():
    stream = make()
    data = stream[0].probes["biography"]
    for row in range(0, len(data), 7):
        person, attribute = 30 + row // 6, ATTRIBUTES[row % 6]
        tokens, labels = data.tensors["input_ids"][row], data.tensors["labels"][row]
        text, value = stream.text(tokens), f" {value_text(stream, person, attribute)}"
        assert text.startswith(f"<end> {full_name(stream, person)}")
        assert text.endswith(value)
        assert stream.text(labels[labels != IGNORE]) == value


def test_who_is_asked_about_when():
    stream = make(num_tasks=2, train_share=0.8)
    zero, *later = stream
    assert [t.name for t in stream] == ["read_about", "new_1", "new_2"]
    assert zero.learned == range(48)
    assert zero.tested == range(48, 60)
    groups = [set(zero.learned), set(zero.tested), set(zero.strangers)]
    groups += [set(t.learned) for t in later]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 60 + 10 + 2 * 20
    for task in later:
        assert task.tested == task.learned
        assert task.test is task.train
        assert task.probes == {}
        assert task.recovery is not None
        halves = _prompts(stream, task.recovery.train), _prompts(stream, task.recovery.test)
        assert not halves[0] & halves[1]
        assert halves[0] | halves[1] == _prompts(stream, task.train)
    assert set(zero.probes) == {"biography", "control"}
    assert zero.recovery.train is zero.train
    assert zero.recovery.test is zero.test
    assert len(zero.recovery.control) == 60
    assert len(zero.validation) == 0


def _prompts(stream, data):
    shown = data.tensors["input_ids"].masked_fill(data.tensors["labels"] != IGNORE, PAD)
    return {stream.text(row) for row in shown}


def test_tasks_do_not_depend_on_how_many_there_are():
    one, three = make(num_tasks=1), make(num_tasks=3)
    for a, b in zip(one, three, strict=False):
        for name in a.train.tensors:
            assert torch.equal(a.train.tensors[name], b.train.tensors[name])
    assert one.fingerprint != three.fingerprint
    assert make().fingerprint == make().fingerprint


def test_floors_are_those_of_always_giving_the_commonest_answer():
    stream = make(people=400, attributes={"university": 6, "major": 3}, variants=2)
    task = stream[0]
    people = stream.world.people
    for attribute in ("university", "major"):
        counts = torch.bincount(people.values[attribute][list(task.tested)]).double()
        share = task.facts["floors"]["exact_match"][attribute]
        assert share == pytest.approx(float(counts.max() / counts.sum()))
    # University of Ashbury, University of Belbury: the first token is shared by a third.
    assert task.facts["floors"]["first_token"]["university"] > 0.3


def test_chance_is_that_of_the_likeliest_value():
    stream = make(attributes={"university": 5, "major": 20}, variants=2)
    assert stream.world.chance == pytest.approx((1 / 5 + 1 / 20) / 2)
    assert stream[0].recovery.chance == stream[1].recovery.chance == stream.world.chance
    world = make().world
    cities = populate(0, 40_000, NAME_SIZES, FULL_SIZES).values["company_city"]
    likeliest = float(torch.bincount(cities).max()) / 40_000
    uniform = sum(1 / FULL_SIZES[a] for a in ATTRIBUTES if a != "company_city")
    assert world.chance == pytest.approx((uniform + likeliest) / 6, abs=1e-3)


def test_openings_are_the_first_tokens_of_each_kind():
    stream = make(whole_values=False)
    for kind, attribute in enumerate(ATTRIBUTES):
        found = {stream.vocabulary[i] for i in stream.openings[kind].nonzero().flatten()}
        pool = values(attribute, FULL_SIZES[attribute])
        assert found == {pieces(f" {text}")[0] for text in pool}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_tasks": -1}, "stream.num_tasks=-1"),
        ({"train_share": 1.0}, "stream.train_share=1.0"),
        ({"templates": 51 + PER_ATTRIBUTE}, "stream.templates"),
        ({"attributes": {"height": 3}}, "no attribute 'height'"),
        ({"attributes": {"major": 1000}}, "stream.attributes.major=1000"),
        ({"attributes": {}}, "stream.attributes"),
        ({"attributes": {"major": 10, "company": 10}, "variants": 3}, "stream.variants=3"),
        ({"names": [1, 2, 3]}, "too few"),
        ({"names": [400, 400]}, "stream.names"),
        ({"epochs": [1]}, "stream.epochs"),
        ({"rates": [1.0, 0.0]}, "stream.rates"),
        ({"new_people": 1}, "stream.new_people"),
    ],
)
def test_wrong_arguments_are_named(options, words):
    with pytest.raises(UsageError, match=words):
        make(**options)


# -- tiers ------------------------------------------------------------------------------------


def read(tier):
    return OmegaConf.load(CONFIGS / f"{tier}.yaml")


@pytest.mark.parametrize("tier", ["smoke", "tiny", "small", "gpu"])
def test_tiers_can_be_made(tier):
    stream = hydra.utils.instantiate(read(tier).stream, _convert_="all")
    assert stream.modality == "text"
    assert all(task.epochs for task in stream)
    context = 512
    assert stream.input_shape[0] <= context
    assert stream.pretraining.batches.__self__.length <= context


def test_the_papers_numbers_of_steps():
    cfg = read("paper").stream
    questions = cfg.people * cfg.train_share * len(ATTRIBUTES)
    assert questions / read("paper").batch_size == 6250
    assert cfg.epochs[0] * 6250 == 62_500
    assert cfg.new_people * len(ATTRIBUTES) / read("paper").batch_size == 2500
    assert cfg.epochs[1] * 2500 == 62_500
    assert (cfg.people, cfg.new_people, cfg.num_tasks) == (100_000, 20_000, 5)


def test_learner_refuses_images_and_small_vocabularies():
    stream = make()
    with pytest.raises(UsageError, match="causal language model"):
        Causal(stream, torch.nn.Linear(2, 2), None, 8, 0)
    with pytest.raises(UsageError, match="reads text, which stream 'toy' does not have"):
        Causal(make_stream(), torch.nn.Linear(2, 2), None, 8, 0)
    assert HOLE < 0
