"""The model card of exported weights, from a run's directory alone."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cl_bench.errors import printable
from cl_bench.metrics import summaries, summarise
from cl_bench.report.escape import markdown
from cl_bench.tracking.files import read_json
from cl_bench.tracking.reading import read_run

SCENARIOS = {
    "domain": "one head with the same labels for every task",
    "task": "one head a task; which task a sample comes from is known at test time",
    "class": "one head that grows with every task; nobody says which task a sample comes from",
}


def model_card(directory: Path, learned: int, loading: str) -> str:
    """What was learned, by which strategy, how well, from whose data, and how to load it.

    Args:
        directory: of the run.
        learned: tasks learned, a row of the accuracy matrix; further ones are requests to forget.
        loading: the section on loading, in Markdown.

    Raises:
        UsageError: the directory holds no run.
    """
    run = read_run(directory)
    data = _marked(read_json(directory / "data.json") or {})
    environment = read_json(directory / "environment.json") or {}
    facts = _marked(run.facts)
    stream, strategy = facts.get("stream", "?"), facts.get("strategy", "?")
    library = "transformers" if data["modality"] == "text" else "pytorch"
    known = "known" if run.task_id_known else "not known"
    tasks = _learnt(data)
    met, learned = max(0, learned - len(tasks)), min(learned, len(tasks))
    after = f" and {met} requests to forget" if met else ""
    row = run.matrix[: learned + 1].copy()
    parts = [
        f"---\nlibrary_name: {library}\ntags: [continual-learning, cl_bench]\n---",
        f"# {stream} after {learned} of {len(run.task_names)} tasks{after}, strategy {strategy}",
        f"Learned one task after another by cl_bench {_version(environment)}: stream "
        f"`{stream}`, strategy `{strategy}`, seed {facts.get('seed', '?')}. The strategy is of "
        "no use any more: these are the weights that it left, as an ordinary network. The full "
        "configuration is in `run.yaml`.",
        loading,
        _backbone(data),
        "## What it can do",
        f"Row {learned} of the run's accuracy matrix: scores on test data after {learned} task(s). "
        f"Which task a sample comes from was **{known}** at test time."
        + (" They are from before the requests: `results.jsonl` has `forget`." if met else ""),
        "\n".join(_table(tasks, row[-1], learned)),
        "\n".join(_summaries(run.matrix, learned)),
        "## Data",
        "\n".join(_origins(tasks[: max(learned, 1)])),
        "Whoever passes the weights on should check what these licences ask for. "
        f"Fingerprint of the data: `{data['fingerprint']}`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _learnt(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The tasks of ``data.json`` without requests to forget."""
    return [task for task in data["tasks"] if task.get("kind", "learn") == "learn"]


def _backbone(data: Mapping[str, Any]) -> str:
    """Whose features the inputs are; nothing where they are the stream's own."""
    backbone = (data.get("facts") or {}).get("backbone")
    if not backbone:
        return ""
    return (
        f"Inputs are features that a frozen network, which is not part of this, makes of the "
        f"stored samples: {backbone.get('layer')}, weights {backbone.get('weights_sha256')} "
        f"({backbone.get('source')}; {backbone.get('licence')}), preprocessing "
        f"{backbone.get('preprocessing')}."
    )


def _marked(value: Any) -> Any:
    """``value`` with every text escaped for Markdown, at any depth."""
    if isinstance(value, str):
        return markdown(printable(value))
    if isinstance(value, Mapping):
        return {k: _marked(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_marked(v) for v in value]
    return value


def heads_section(data: Mapping[str, Any], learned: int, heads: int) -> str:
    """Which outputs are there, and what each of them stands for.

    Args:
        data: what ``data.json`` holds.
        learned: tasks learned.
        heads: heads that are exported.
    """
    scenario, data = data["scenario"], _marked(data)
    lines = [f"Scenario `{scenario}`: {SCENARIOS[scenario]}."]
    if learned == 0:
        lines.append("No task is learned yet: the outputs are those of untrained heads.")
    if scenario == "domain":
        lines.append(f"Output column i is class i, of {data['tasks'][0]['classes']}, in any task.")
        names = data["tasks"][0].get("facts", {}).get("class_names")
        alike = all(task.get("facts", {}).get("class_names") == names for task in data["tasks"])
        lines.append(f"The classes are {', '.join(names)}." if names and alike else "")
        return " ".join(filter(None, lines))
    lines.append("Output columns, one head after another:\n")
    for task in _learnt(data):
        if task["head"] >= heads:
            continue
        stop = task["first_class"] + task["classes"]
        names = ", ".join(task.get("facts", {}).get("class_names", ()))
        where = f"{task['first_class']}:{stop}" + (f" ({names})" if names else "")
        lines.append(f"- head {task['head']}, task {task['name']}: {where}")
    left_out = len({t["head"] for t in data["tasks"]}) - heads
    if left_out:
        lines.append(f"\nThe heads of {left_out} later task(s) are untrained and left out.")
    if scenario == "task":
        lines.append(
            "\nFor a sample of a task, look only at its columns: "
            "`logits[:, first:stop].argmax(1) + first`."
        )
    return "\n".join(lines)


def _table(tasks: Sequence[Mapping[str, Any]], row: Any, learned: int) -> Iterator[str]:
    yield "| | task | classes | score | measured by |"
    yield "|---|---|---|---|---|"
    for i, (task, score) in enumerate(zip(tasks, row, strict=True)):
        state = "learned" if i < learned else "not learned"
        shown = "-" if np.isnan(score) else f"{score:.4f}"
        yield f"| {state} | {task['name']} | {task['classes']} | {shown} | {task['metric']} |"


def _summaries(matrix: Any, learned: int) -> Iterator[str]:
    then = np.full_like(matrix, np.nan)
    then[: learned + 1] = matrix[: learned + 1]
    for name, value in summarise(then).items():
        if not np.isnan(value):
            label, meaning = summaries()[name].label, summaries()[name].meaning
            meaning = meaning.replace("at the end", "at this point").replace("all tasks", "tasks")
            yield f"- {label}: {value:.4f} ({meaning})"


def _origins(tasks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for source, licence, citation in dict.fromkeys(
        (t["source"], t["licence"], t["citation"]) for t in tasks
    ):
        yield f"- {source}. Licence: {licence}. Citation: {citation}"


def _version(environment: Mapping[str, Any]) -> str:
    packages = environment.get("packages", {})
    commit = (environment.get("git") or {}).get("commit")
    torch = f"PyTorch {packages.get('torch')}"
    at = f", commit {commit[:12]} of the working directory" if commit else ""
    return markdown(printable(f"{packages.get('cl_bench')} ({torch}{at})"))
