"""``python -m cl_bench general=<run> tasks=[ifeval,mmlu]``: what a run cost its model in general.

Every row of weights that the run keeps is asked the tasks of lm-evaluation-harness. What is found
goes to a file of its own in the run's folder ``general``, row by row, so that the same command goes
on where it was stopped; what the run recorded stays as it is.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from cl_bench.cli.export import Order, find_weights, require_one_network
from cl_bench.cli.exported import WeightsAlone, load_language, tokenizer_of
from cl_bench.cli.objects import build
from cl_bench.cli.recorded import named, read_recorded
from cl_bench.cli.trust import read_trust
from cl_bench.contracts import UsageError
from cl_bench.contracts.checking import check
from cl_bench.contracts.options import Count, Index, known
from cl_bench.experiment.harness import TINY, Harness
from cl_bench.experiment.weights import TaskWeights
from cl_bench.report.tables import general_table
from cl_bench.tracking import read_matrix
from cl_bench.tracking.files import read_json, to_json, write_atomically
from cl_bench.tracking.reading import AFTERWARDS, asked_afterwards


@dataclass(frozen=True)
class Asked:
    """What the harness is asked; as ``conf/probe/general.yaml`` has it.

    Attributes:
        tasks: names.
        folder: with further tasks.
        limit: most questions of a task.
        num_fewshot: examples before each.
        chat: write questions as turns of a chat.
        batch_size: questions of a batch.
    """

    tasks: Sequence[str] = TINY
    folder: str | None = None
    limit: Count | None = None
    num_fewshot: Index | None = None
    chat: bool = False
    batch_size: Count = 8


def general(arguments: Sequence[str]) -> Path:
    """Measure what ``general=<run directory> tasks=[...]`` asks for; returns the file.

    Raises:
        UsageError: there is no such run or task, its model is none of transformers, its weights are
            gone, or its strategy answers otherwise than by them.
    """
    trust, arguments = read_trust(arguments)
    directory, others = named(arguments, "general")
    asked = _asked(others)
    harness = Harness(**asdict(asked), prefix="")
    run = read_recorded("general", directory, trust)
    harness.check()
    names, _ = read_matrix(directory)
    data = read_json(directory / "data.json") or {}
    kept = TaskWeights(directory).kept()
    if not kept:
        raise UsageError(
            f"general={directory}: no weights are kept; python -m cl_bench reproduce={directory} "
            "checkpoint.enabled=true checkpoint.weights=all makes them"
        )
    last = kept[-1]
    require_one_network(Order(run, last, directory, data, word="general"))
    told = {**asdict(asked), "tasks": list(asked.tasks)}
    identity = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
    path = directory / AFTERWARDS / f"{identity}.json"
    rows: dict[str, Any] = (read_json(path) or {}).get("rows", {}) if path.exists() else {}
    path.parent.mkdir(exist_ok=True)
    tokenizer = tokenizer_of(run, data)
    for learned in kept:
        if str(learned) in rows:
            continue
        model = _model(run, data, find_weights(directory, learned))
        rows[str(learned)] = harness.score(model, tokenizer)
        write_atomically(path, to_json({"asked": told, "rows": rows}, 2).encode())
        print(f"after {learned} task(s): {rows[str(learned)]}", flush=True)
    Console().print(general_table(asked_afterwards(directory), names))
    print(f"{path} has them")
    return path


def _asked(others: Sequence[str]) -> Asked:
    options = {}
    there = list(Asked.__dataclass_fields__)
    for text in others:
        key, _, value = text.partition("=")
        if key not in there:
            raise UsageError(
                f"{text}: general=<run directory> takes {', '.join(there)}.{known(key, there)}"
            )
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(f"{text}: cannot be read; write tasks=[a,b]") from None
    if isinstance(options.get("tasks"), str):
        options["tasks"] = [options["tasks"]]
    return Asked(**check(Asked, options))


def _model(run: Any, data: Any, weights: Any) -> Any:
    sizes = {task["head"]: task["classes"] for task in data["tasks"]}
    with run.surroundings():
        model = build(
            run.cfg.model, input_shape=tuple(data["input_shape"]), vocabulary=sum(sizes.values())
        )
    if not hasattr(model, "save_pretrained"):
        raise UsageError(
            f"general={run.directory}: its model is none of transformers, which alone the harness "
            "can ask"
        )
    try:
        load_language(model, weights)
    except WeightsAlone as reason:
        raise UsageError(f"general={run.directory}: {reason}") from None
    import torch

    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
