"""Small federations, and a round of one step by step."""

import functools

import torch
from toys import Silent

from cl_bench.contracts import Plan
from cl_bench.experiment import LoopSettings
from cl_bench.federation import (
    FederatedEngine,
    Federation,
    PlainReducer,
    client_statistics,
    server_end_task,
)
from cl_bench.federation.client import Turn, client_weights
from cl_bench.federation.partition import ClientTask, Part
from cl_bench.strategies.federated.fot import FOT

FEDERATION = Federation(clients=5, per_round=3, rounds=3)
SKETCHES = ("gram", "gaussian", "uniform")


def engine_of(learner, strategy, federation=FEDERATION, reducer=None, seed=0):
    return FederatedEngine(
        learner,
        strategy,
        None,
        LoopSettings(seed, learner.batch_size),
        None,
        Silent(),
        Silent(),
        federation=federation,
        reducer=reducer,
    )


def learn(learner, strategy, stream, federation=FEDERATION, reducer=None):
    engine = engine_of(learner, strategy, federation, reducer)
    for task in stream:
        engine.learn(task, Plan(task.train))
        yield task


def whole(task):
    """The task as a client that holds all of it."""
    return ClientTask(task, Part(task.train, torch.arange(len(task.train))))


def split(task, parts):
    rows = torch.tensor_split(torch.randperm(len(task.train)), parts)
    return [ClientTask(task, Part(task.train, r)) for r in rows]


def total(uploads):
    reducer = PlainReducer()
    for k, upload in enumerate(uploads):
        reducer.add(k, upload)
    return reducer.result()


def end_task(learner, strategy, clients, task):
    """GPSE: all clients' statistics, summed, at the weights that the learner has."""
    now = client_weights(learner)
    uploads = [
        client_statistics(learner, strategy, now, client, Turn(0, task.index, 0, k))
        for k, client in enumerate(clients)
    ]
    server_end_task(learner, strategy, now, task, total(uploads).sums)
    return uploads


fot_local = functools.partial(FOT, sketch="gaussian", residual_ratio="norm", extraction="local")
