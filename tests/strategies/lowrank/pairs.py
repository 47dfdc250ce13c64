"""Networks with pairs, and steps of their training."""

import functools

from biographies import batch_of

from cl_bench.experiment import seed_training
from cl_bench.strategies.lowrank.o_lora import OLoRA
from cl_bench.strategies.lowrank.seq_lora import SeqLoRA

seq_lora = functools.partial(SeqLoRA, rank=2)
o_lora = functools.partial(OLoRA, rank=2)


def steps(learner, strategy, task, count=3, boundary=True):
    """A task in a plain loop, dropout and all; up to its boundary or through it."""
    seed_training(task.index)
    learner.begin(task, strategy)
    learner.train()
    optimizer = learner.configure_optimizers()
    for i in range(count):
        batch = batch_of(task.train, *(n % len(task.train) for n in range(8 * i, 8 * i + 8)))
        optimizer.zero_grad()
        learner.training_step(batch, i).backward()
        strategy.constrain(learner)
        optimizer.step()
    if boundary:
        strategy.consolidate(learner, task, strategy.collect(learner, task))
        strategy.release(learner)
    return optimizer
