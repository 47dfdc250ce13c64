"""What a conversation's loss, scores and drawn labels are, against the model called by hand."""

import functools
import math

import chats
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from chats import said, saved, write
from torch.optim import SGD

from cl_bench.contracts import IGNORE, UsageError
from cl_bench.learners import Causal, Seq2Seq, language
from cl_bench.models import t5
from cl_bench.tasks.chat import Chat

ROWS = [said("hi", "yo", "so", "ok"), said("a longer question", "no")] * 3


def chat(tmp_path, family="gemma3", rows=ROWS, **options):
    options = {"validation_fraction": 0.0, "tokenizer": str(saved(family)), **options}
    return Chat([write(tmp_path / "rows.jsonl", rows)], **options)


def learner_of(stream, family="gemma3"):
    model = chats.model(family, len(stream.vocabulary))
    return language(stream, model, functools.partial(SGD, lr=0.1), batch_size=4, seed=0).eval()


def by_hand(learner, batch):
    """(log-likelihood, is answer) of every learned token of every sample, one sequence a pass."""
    found = []
    for i in range(len(batch["input_ids"])):
        n = int(batch["attention_mask"][i].sum())
        answer = batch["labels"][i][batch["labels"][i] != IGNORE]
        tokens = torch.cat([batch["input_ids"][i, :n], answer])
        earlier = batch.get("earlier", torch.full_like(batch["input_ids"], IGNORE))[i, :n]
        wanted = torch.cat([earlier, answer])
        logits = learner.model(tokens[None]).logits[0].log_softmax(1)
        found.append(
            [(logits[j - 1, wanted[j]], j >= n) for j in range(1, len(wanted)) if wanted[j] >= 0]
        )
    return found


def test_the_loss_is_over_all_answers_of_a_conversation(tmp_path):
    stream = chat(tmp_path)
    learner = learner_of(stream)
    batch = stream[0].train[torch.arange(4)]
    assert (batch["earlier"] != IGNORE).any(1).tolist() == [True, False] * 2  # in the file's order
    tokens = [value for row in by_hand(learner, batch) for value, _ in row]
    loss = learner.loss(learner(batch), batch)
    assert float(loss) == pytest.approx(-float(torch.stack(tokens).mean()), rel=1e-5)
    assert learner.loss_terms(batch) == len(tokens)
    assert any(not answer for row in by_hand(learner, batch) for _, answer in row)


def test_drawn_labels_stand_where_the_labels_stood(tmp_path, monkeypatch):
    stream = chat(tmp_path)
    learner = learner_of(stream)
    batch = stream[0].train[torch.arange(4)]

    def sure(out, batch):
        """A model that says, for certain, the token whose number is one less than the label's."""
        logits, wanted = Causal.targets(learner, out, batch)
        said = F.one_hot((wanted - 1).clamp_min(0), logits.shape[2])
        return 1e4 * said.float(), wanted

    monkeypatch.setattr(learner, "targets", sure)
    drawn = learner.draw_labels(batch, torch.Generator().manual_seed(0))
    for name in ("labels", "earlier"):
        known = batch[name] != IGNORE
        assert (drawn[name] == torch.where(known, batch[name] - 1, IGNORE)).all()
        assert known.any()


def test_test_loss_is_a_samples_likelihood_of_a_token(tmp_path):
    stream = chat(tmp_path)
    learner = learner_of(stream)
    batch = stream[0].train[torch.arange(4)]
    test = {name: value for name, value in batch.items() if name != "earlier"}
    losses = [
        -float(torch.stack([v for v, answer in row if answer]).mean())
        for row in by_hand(learner, batch)
    ]
    with torch.no_grad():
        out = learner(test)
        scores = learner.score(out, test)
        details = learner.details(out, test)["loss"]
    assert scores.tolist() == pytest.approx([math.exp(-loss) for loss in losses], rel=1e-5)
    assert details.tolist() == pytest.approx(losses, rel=1e-5)


def test_the_likeliest_choice_is_found_by_whole_answers(tmp_path):
    rows = [
        {"prompt": f"q{i}", "completion": "yes", "choices": ["yes", "no", "perhaps"]}
        for i in range(6)
    ]
    stream = chat(tmp_path, "qwen3", rows, metric="choice_likelihood")
    learner = learner_of(stream, "qwen3")
    batch = stream[0].train[torch.arange(4)]
    words = chats.tokenizer("qwen3")
    wanted = []
    for i in range(4):
        n = int(batch["attention_mask"][i].sum())
        sums = []
        for choice in rows[0]["choices"]:
            text = f"<think>\n\n</think>\n\n{choice}<|im_end|>"
            answer = words(text, add_special_tokens=False)["input_ids"]
            tokens = torch.tensor([[*batch["input_ids"][i, :n].tolist(), *answer]])
            logits = learner.model(tokens).logits[0].log_softmax(1)
            sums.append(sum(float(logits[n + j - 1, t]) for j, t in enumerate(answer)))
        wanted.append(float(sums.index(max(sums)) == 0))
    with torch.no_grad():
        assert learner.score(learner(batch), batch).tolist() == wanted


def test_tasks_of_one_batch_are_scored_each_by_its_own_metric(tmp_path):
    paths = [write(tmp_path / f"{n}.jsonl", [said("hi", "yo")] * 3) for n in "ab"]
    own = {"a": "exact_match", "b": "test_loss"}
    data = [{"path": p, "metric": m} for p, m in zip(paths, own.values(), strict=True)]
    stream = Chat(data, tokenizer=str(saved("gemma3")), validation_fraction=0.0)
    learner = learner_of(stream)
    parts = [task.test[torch.arange(1)] for task in stream]
    both = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    with torch.no_grad():
        apart = [float(learner.score(learner(part), part)) for part in parts]
        assert learner.score(learner(both), both).tolist() == pytest.approx(apart)
    assert apart[0] == 0.0
    assert 0 < apart[1] < 1


def test_an_encoder_decoder_learns_last_turns_alone(tmp_path):
    several = chat(tmp_path, "gemma3")
    with pytest.raises(UsageError, match=r"stream\.turns=last"):
        Seq2Seq(several, t5(len(several.vocabulary), depth=1, width=8, heads=2, feed_forward=8),
                functools.partial(SGD, lr=0.1), 4, 0)  # fmt: skip
