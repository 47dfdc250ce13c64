"""What is replayed is what the model said when the task was new, whatever the data says."""

import torch
from texts import make_learner, make_stream

from cl_bench.contracts import IGNORE
from cl_bench.strategies.replay.self_replay import SelfReplay


def learned(temperature=0.0):
    stream = make_stream()
    learner = make_learner("gpt2", stream).eval()
    strategy = SelfReplay(memory=20, samples=6, replay=3, temperature=temperature)
    strategy.setup(learner, stream[0])
    batch = stream[1].train[torch.arange(2)]
    assert strategy.on_batch(learner, batch) is batch  # nothing is old yet
    strategy.consolidate(learner, stream[0], {})
    return stream, learner, strategy


def test_old_prompts_come_with_the_models_own_answers():
    stream, learner, strategy = learned()
    assert strategy.exemplars == 6
    batch = stream[1].train[torch.arange(2)]
    whole = strategy.on_batch(learner, batch)
    assert {k: len(v) for k, v in whole.items()} == dict.fromkeys(batch, 5)
    own = {k: v[2:] for k, v in whole.items()}
    prompts = {
        stream.text(row[row != stream.pad]) for row in stream[0].train[torch.arange(9)]["input_ids"]
    }
    for row, text in enumerate(learner.answers(own)):
        assert stream.text(own["input_ids"][row][own["attention_mask"][row].bool()]) in prompts
        assert stream.text(own["labels"][row]) == text
        labels = own["labels"][row]
        kept = labels[labels != IGNORE]
        ended = (kept == stream.end).sum()
        assert ended <= 1
        assert len(kept) == stream.answer_length or kept[-1] == stream.end
    right = {stream.answer(int(e)) for e in own["example"]}
    assert not right & set(learner.answers(own))  # a random model knows none of them


def test_sampled_answers_follow_the_seed_and_leave_the_runs_numbers_alone():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, second = learned(1.0)[2], learned(1.0)[2]
    assert torch.equal(first.buffer["labels"], second.buffer["labels"])
    assert not torch.equal(first.buffer["labels"], learned()[2].buffer["labels"])
    torch.manual_seed(3)
    assert torch.equal(before, torch.random.get_rng_state())
