"""The phenomenon on the tiny tier (Zheng et al., ICLR 2025): minutes on two cores, one seed.

Bands with a wide margin around what one seed gave; they guard the experiment, they prove nothing.
"""

import copy
import functools
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from toys import Silent

from cl_bench.experiment import TrainLoader, pretrain, seed_training
from cl_bench.learners import Causal
from cl_bench.strategies.finetune import Finetune
from cl_bench.strategies.freeze import Freeze

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

CONF = Path(__file__).parents[1] / "conf"
RATE = 2e-4


def quiet_trainer(callbacks=(), **options):
    from lightning import Trainer

    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )


@pytest.fixture(scope="module")
def tiny():
    """Stream and learner right after task 0, the checkpoint taken from the cache if it is there."""
    config = OmegaConf.load(CONF / "stream/biography/tiny.yaml").stream
    stream = hydra.utils.instantiate(config, _convert_="all")
    seed_training(0)
    model = hydra.utils.instantiate(
        OmegaConf.load(CONF / "model/gpt_tiny.yaml"), vocabulary=len(stream.vocabulary)
    )
    factory = functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.01)
    learner = Causal(stream, model, factory, batch_size=48, seed=0)
    pretrain(learner, stream.pretraining, quiet_trainer, 0, Silent())
    assert score(learner, stream[0].probes["biography"]) >= 0.95
    learn(learner, stream[0], 536, 5e-4)
    return stream, learner


def score(learner, data):
    return learner.performance(data[torch.arange(len(data))])


def type_rate(learner, data):
    batch = data[torch.arange(len(data))]
    with torch.no_grad(), learner._evaluating():
        return float(learner.details(learner(batch), batch)["type_rate"].mean())


def learn(learner, task, steps, rate, strategy=None, seed=0):
    learner.begin(task, strategy or Finetune())
    learner.train()
    optimizer = torch.optim.AdamW(learner.trainable_parameters(), lr=rate, weight_decay=0.01)
    loader = TrainLoader(task.train, 48, seed, task.index)
    while steps:
        for batch in loader:
            optimizer.zero_grad()
            learner.loss(learner(batch), batch).backward()
            optimizer.step()
            steps -= 1
            if not steps:
                break


def test_old_answers_collapse_before_new_ones_are_learned_and_come_back(tiny):
    stream, learner = tiny[0], copy.deepcopy(tiny[1])
    old, new = stream[0], stream[1]
    ceiling = score(learner, old.test)
    assert ceiling >= 0.45
    assert type_rate(learner, old.test) >= 0.9
    assert score(learner, old.probes["control"]) <= 0.08
    learn(learner, new, 40, RATE)
    assert score(learner, old.test) <= 0.5 * ceiling
    assert score(learner, new.test) <= 0.2
    assert type_rate(learner, old.test) >= 0.9
    learn(learner, old, 50, RATE, seed=77)
    assert score(learner, old.test) >= 0.85 * ceiling
    assert score(learner, old.probes["control"]) <= 0.08


def test_with_every_block_frozen_old_answers_stay_and_new_ones_are_not_learned(tiny):
    stream, learner = tiny[0], copy.deepcopy(tiny[1])
    ceiling = score(learner, stream[0].test)
    learn(learner, stream[1], 400, RATE, Freeze(4))
    assert score(learner, stream[0].test) >= 0.9 * ceiling
    assert score(learner, stream[1].test) <= 0.2
