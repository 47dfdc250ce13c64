"""Runs of heads in closed form, and what they should come to."""

import torch
from toys import make_engine, make_learner


def learned(stream, strategy, order=None, batch_size=10, model=None, **options):
    """Learner, strategy and engine after the tasks, in some order."""
    dtype = options.pop("dtype", torch.float32)
    learner = make_learner(stream, model, options.pop("optimizer", None), batch_size).to(dtype)
    strategy.check(learner)
    engine = make_engine(learner, strategy, batch_size=batch_size, **options)
    for t in order or range(len(stream)):
        engine.learn(stream[t], strategy.plan(stream, t))
    learner.eval()
    return learner, strategy, engine


def double(stream):
    """The stream, its inputs in double precision."""
    for task in stream:
        task.data.tensors["x"] = task.data.tensors["x"].double()
    return stream


def union(stream):
    """All samples of all tasks."""
    batches = [task.everything for task in stream]
    return {k: torch.cat([b[k] for b in batches]) for k in ("x", "y")}
