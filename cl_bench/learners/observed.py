"""What can be read off a learner between two steps without leaving a trace.

Scores, losses and hidden states at the current weights, as evaluation sees them: in evaluation
mode, without gradients, inside the strategy's ``inference`` context, at the Trainer's precision.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cl_bench.contracts import IGNORE, Batch, Task
from cl_bench.learners.module import BaseLearner, trainer_of
from cl_bench.learners.text import LanguageLearner


def judge(learner: BaseLearner, batch: Batch, task: Task) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Scores (n,) and details of every sample, on the CPU; NaN where outputs are not finite."""
    batch = learner._to_device(batch)
    with _reading(learner, task):
        out = learner.answer(batch, task)
        known = learner.finite(out, batch)
        details = learner.details(out, batch)
        score = learner.score(out, batch).where(known, torch.nan)
        return score.cpu(), {k: v.where(known, torch.nan).cpu() for k, v in details.items()}


def answers(learner: BaseLearner, task: Task, batch: Batch) -> Tensor:
    """Outputs for the batch as at test, on the CPU."""
    with _reading(learner, task):
        return learner.answer(learner._to_device(batch), task).cpu()


def embedded(learner: BaseLearner, batch: Batch, task: Task) -> Tensor:
    """Features of every sample (n, d), on the CPU."""
    with _reading(learner, task):
        return learner.features(learner._to_device(batch)).float().cpu()


def loss_on(learner: BaseLearner, batch: Batch, task: Task | None) -> float:
    """Mean training loss over the batch, without any penalty; None for what is of no task."""
    batch = learner._to_device(batch)
    with _reading(learner, task):
        return float(learner.loss(learner(batch), batch))


def log_probabilities(learner: BaseLearner, batch: Batch, task: Task) -> Tensor:
    """What the network says of every sample, or labelled token: float32 (k, C), on the CPU."""
    batch = learner._to_device(batch)
    with _reading(learner, task):
        out = learner.answer(batch, task)
        if isinstance(learner, LanguageLearner):
            logits, labels = learner.targets(out, batch)
            out = logits[labels != IGNORE]
        return out.float().log_softmax(-1).cpu()


def hidden_states(learner: BaseLearner, batch: Batch, task: Task) -> dict[str, Tensor]:
    """What enters the first block (``embeddings``, where there are some) and leaves each block.

    Returns:
        float32 (n, d) by the block's name, on the CPU.
    """
    batch = learner._to_device(batch)
    names = {id(module): name for name, module in learner.network.named_modules()}
    found: dict[str, Tensor] = {}

    def keep(name: str, hidden: Any) -> None:
        tensor = hidden[0] if isinstance(hidden, tuple) else hidden
        found[name] = learner.representation(tensor, batch, name).float().cpu()

    def entering(module: nn.Module, given: tuple[Any, ...]) -> None:
        keep("embeddings", given)

    def leaving(module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        keep(names[id(module)], out)

    blocks = learner.blocks()
    handles = [block.register_forward_hook(leaving) for block in blocks]
    if learner.embeddings():
        handles.append(blocks[0].register_forward_pre_hook(entering))
    try:
        with _reading(learner, task):
            learner(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def freed(learner: BaseLearner) -> list[nn.Parameter]:
    """Every parameter that anything may train, freed from whatever holds it."""
    free = [p for p in learner.parameters() if learner.learns(p)]
    for parameter in free:
        parameter.requires_grad_(True)
    learner.held_norms.clear()
    return free


def plain_optimizer(learner: BaseLearner, parameters: list[nn.Parameter], rate: float) -> Optimizer:
    """A fresh optimizer of the run's kind on ``parameters``, its learning rate times ``rate``."""
    optimizer = learner.make_optimizer([{"params": parameters}])
    for group in optimizer.param_groups:
        group["lr"] *= rate
    return optimizer


@contextmanager
def _reading(learner: BaseLearner, task: Task | None) -> Iterator[None]:
    with (
        torch.no_grad(),
        learner.evaluating(),
        learner.strategy.inference(learner, learner.told(task)),
        _precision(learner),
    ):
        yield


def _precision(learner: BaseLearner) -> AbstractContextManager[Any]:
    trainer = trainer_of(learner)
    return nullcontext() if trainer is None else trainer.precision_plugin.forward_context()
