"""What cannot work together, found before any work starts."""

from collections.abc import Mapping

import torch

from cl_bench.contracts import Strategy, Stream, Task, UsageError
from cl_bench.contracts.strategy import overrides
from cl_bench.experiment.loader import require_labels, require_samples, require_validation
from cl_bench.experiment.plateau import Plateau
from cl_bench.learners import BaseLearner

GLANCE = 100
"""Training samples of every task that are looked at before any task is learned."""


def check_tasks(stream: Stream, validated: bool = False) -> None:
    """Raise :class:`UsageError` if a task is empty, or its data is not what a learner can take.

    With ``validated``, it needs validation samples as well.
    Looks at a few samples of each task, so that the last one does not fail after hours of training;
    the engine looks at all labels of a task before it learns it.
    """
    for task in stream:
        check_name(task.name)
        drawn = task.sample(GLANCE, 0)
        check_batch(stream, task, drawn, "training")
        require_samples(next(iter(drawn.values()), ()), task.name, "training")
        require_labels(task, drawn)
        require_samples(task.scored, task.name, "test")
        scored = task.scored[torch.arange(min(GLANCE, len(task.scored)))]
        check_batch(stream, task, scored, "test")
        require_labels(task, scored)
        if validated:
            require_validation(task)


def check_name(name: object) -> None:
    """Raise :class:`UsageError` if a task's name cannot be written into a file."""
    try:
        written = isinstance(name, str) and name.strip() and name.encode()
    except UnicodeEncodeError:
        written = False
    if not written:
        raise UsageError(f"a task is called {name!r}: give it a name of characters that UTF-8 has")


def check_batch(stream: Stream, task: Task, batch: object, split: str) -> None:
    """Raise :class:`UsageError` if a batch is not as :data:`~cl_bench.contracts.Batch` says.

    Text has forms of its own, which its learners check.

    Args:
        stream: whose task it is.
        task: whose data it is.
        batch: what ``data[index]`` gave.
        split: which of its data.
    """
    where = f"stream {stream.name!r}, task {task.name!r}, {split} data"
    if not isinstance(batch, Mapping) or not all(map(torch.is_tensor, batch.values())):
        kinds = (
            {k: type(v).__name__ for k, v in dict(batch).items()}
            if isinstance(batch, Mapping)
            else type(batch).__name__
        )
        raise UsageError(
            f"{where}: data[index] gives {kinds}, and must give a dictionary of tensors, such as "
            '{"x": ..., "y": ...}'
        )
    if stream.modality == "text":
        return
    wanted = ["x", "y", *(["task"] if stream.task_id_at_test else [])]
    missing = [name for name in wanted if name not in batch]
    if missing:
        why = ", since the task id is known at test time" if missing == ["task"] else ""
        raise UsageError(
            f"{where}: batches hold {', '.join(batch)} and must hold {missing[0]!r} too{why}; "
            f"{KEYS[missing[0]]}"
        )
    n = len(batch["x"]) if batch["x"].ndim else 0
    form = {"x": (stream.input_dtype, stream.input_shape), "y": (torch.int64, ())}
    if "task" in batch:
        form["task"] = (torch.int64, ())
    for name, (dtype, shape) in form.items():
        values: torch.Tensor = batch[name]
        if values.dtype != dtype or values.shape != (n, *shape):
            had = f"{str(values.dtype).removeprefix('torch.')} of shape {tuple(values.shape)}"
            needed = f"{str(dtype).removeprefix('torch.')} of shape {(n, *shape)}"
            raise UsageError(f"{where}: {name!r} is {had} and must be {needed}; {KEYS[name]}")
    if not batch["x"].isfinite().all():
        raise UsageError(f"{where}: 'x' holds values that are NaN or infinite; clean them first")
    if "task" in batch and (batch["task"] != task.index).any():
        raise UsageError(
            f"{where}: 'task' is {batch['task'].unique().tolist()} and must be the task's index, "
            f"{task.index}, for every sample"
        )


KEYS = {
    "x": "inputs are x.float(), images scaled as well, x.float() / 255, each of the stream's "
    "input_shape",
    "y": "labels are positions of classes, y.long(), one number a sample, y.flatten()",
    "task": "it is torch.full_like(y, task.index)",
}
"""How a stream makes what a learner takes."""


def check_pair(
    name: str,
    strategy: Strategy,
    stream: Stream,
    federated: bool = False,
    streaming: bool = False,
) -> None:
    """Raise :class:`UsageError` if stream or engine do not give what the strategy needs.

    Args:
        name: of the strategy.
        strategy: which updates are allowed.
        stream: the tasks.
        federated: whether clients and a server learn them.
        streaming: whether they are met once, tested first.
    """
    needs = strategy.needs
    if needs.task_id_at_test and not stream.task_id_at_test:
        raise UsageError(
            f"strategy {name!r} needs the task id at test time, stream {stream.name!r} "
            f"(scenario {stream.scenario!r}) does not give it: use a task-incremental stream, or "
            "let a domain-incremental one give it with stream.task_id_at_test=true"
        )
    if needs.modalities and stream.modality not in needs.modalities:
        raise UsageError(
            f"strategy {name!r} learns {' or '.join(sorted(needs.modalities))} streams, stream "
            f"{stream.name!r} is of {stream.modality.removesuffix('s')}s"
        )
    if any(task.kind == "forget" for task in stream) and not needs.forgets:
        raise UsageError(
            f"strategy {name!r} would learn what stream {stream.name!r} asks to forget: use one "
            "that forgets, such as strategy=relabel"
        )
    if needs.scenarios and stream.scenario not in needs.scenarios:
        raise UsageError(
            f"strategy {name!r} learns streams of scenario {' or '.join(sorted(needs.scenarios))}, "
            f"where every task brings classes of its own; stream {stream.name!r} is of scenario "
            f"{stream.scenario}: use another, such as +stream=split_digits stream.scenario=class"
        )
    if stream.modality == "text" and overrides(strategy, "predict"):
        raise UsageError(
            f"strategy {name!r} answers for the network, which on text streams generates: use a "
            "stream of classes"
        )
    latest = max((m.needs for m in strategy.members), key=lambda n: n.first_task)
    if len(stream) > 1 and latest.first_task >= len(stream):
        raise UsageError(
            f"{latest.said('first_task', latest.first_task)}: has no effect, as stream "
            f"{stream.name!r} has {len(stream)} tasks, counted from 0; at most {len(stream) - 1}"
        )
    if federated and "federated" not in needs.engines:
        raise UsageError(
            f"strategy {name!r} learns from one site's data and cannot run in a federation: leave "
            "+federation=... out, or use one that learns from clients' (docs/federation.md)"
        )
    if not federated and "local" not in needs.engines:
        if streaming and "streaming" in needs.engines:
            return
        if "federated" not in needs.engines:
            raise UsageError(f"strategy {name!r} observes a stream: add +engine=streaming")
        raise UsageError(
            f"strategy {name!r} runs in a federation: add one, for example +federation=small"
        )


def check_batches(
    stream: Stream,
    learner: BaseLearner,
    batch_size: int,
    scored: Mapping[str, int | None],
    validated: bool,
) -> None:
    """Raise :class:`UsageError` if a layer that needs company would meet a batch of one sample.

    Args:
        stream: the tasks.
        learner: whose layers they are.
        batch_size: samples of a training batch.
        scored: by key, what limits the samples of a batch that is scored; None does not.
        validated: whether the validation loss is measured.
    """
    if not learner.need_company:
        return
    name = learner.need_company[0]
    why = (
        f"layer {name!r} normalises by the batch, and one value a channel has no spread: use at "
        "least two samples, or another norm (model.norm=...)"
    )
    if batch_size < 2:
        raise UsageError(f"batch_size={batch_size}: {why}")
    for task in stream:
        if len(next(iter(task.sample(2, 0).values()))) < 2:
            raise UsageError(f"task {task.name!r} has one training sample: {why}")
    if not set(learner.need_company) & set(learner.by_batch):
        return
    why += "; model.norm=running_statistics scores samples one by one"
    for key, limit in scored.items():
        if limit is not None and limit < 2:
            raise UsageError(f"{key}={limit}: {why}")
    for task in stream:
        if len(task.scored) == 1:
            raise UsageError(f"task {task.name!r} has one test sample: {why}")
        if validated and len(task.validation) == 1:
            raise UsageError(f"task {task.name!r} has one validation sample: {why}")


def takes_no_steps(strategy: Strategy, stream: Stream) -> bool:
    """Whether no task is learned by steps: in closed form, or not at all."""
    first = strategy.plan(stream, 0)
    if first is None or first.epochs != 0:
        return False
    plans = (strategy.plan(stream, t) for t in range(1, len(stream)))
    return all(plan is None or plan.epochs == 0 for plan in plans)


def check_epochs(strategy: Strategy, stream: Stream, max_epochs: int) -> None:
    """Raise :class:`UsageError` if a task is learned for fewer epochs than the strategy needs.

    Likewise if it adapts the network, and no task is learned by steps; and if it cannot plan the
    first task.
    """
    if takes_no_steps(strategy, stream) and any(m.needs.adapts for m in strategy.members):
        raise UsageError(
            "this strategy takes no steps in any task, so that an adapter would learn nothing: "
            "leave adapter=... out, or give a task epochs"
        )
    for needs in (member.needs for member in strategy.members if member.needs.epochs > 1):
        for t, task in enumerate(stream):
            plan = strategy.plan(stream, t)
            if plan is None:
                continue
            epochs = max_epochs if task.epochs is None else task.epochs
            epochs = epochs if plan.epochs is None else plan.epochs
            if epochs < needs.epochs:
                raise UsageError(
                    f"{needs.said('epochs', needs.epochs)}: task {task.name!r} has {epochs} "
                    "epochs; name one of them, or null for the last"
                )


def check_schedule(strategy: Strategy, schedule: object) -> None:
    """Raise :class:`UsageError` if the strategy waits for a plateau that nothing looks for."""
    waiting = [m.needs for m in strategy.members if m.needs.plateau]
    if waiting and not isinstance(schedule, Plateau):
        said = waiting[0].said("plateau", "plateau")
        raise UsageError(
            f"{said}: this run does not lower its rate on a plateau; add schedule=plateau, or "
            f"leave {said} out"
        )
