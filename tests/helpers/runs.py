"""Comparing the files that two runs left: everything but the time it took."""

import json
from pathlib import Path

from cl_bench.experiment import Checkpoints, CheckpointSettings
from cl_bench.experiment.checkpoint import read_checkpoint
from cl_bench.report.comparison import MEASURED

ELSEWHERE = {"command.txt", "config.yaml", "resumes.jsonl", "environment.json", "wandb_id.txt"}
"""Files that say where, when and by which command."""


def contents(directory, ignore=()):
    """What a run left, by file name, without times."""
    found = {}
    for path in sorted(Path(directory).iterdir()):
        if path.is_dir() or path.name in ELSEWHERE:
            continue
        if path.suffix == ".jsonl":
            events = map(json.loads, path.read_text().splitlines())
            found[path.name] = [
                timeless(e, ignore) for e in events if not (ignore and e["event"] == "weights")
            ]
        elif path.name == "summary.json":
            found[path.name] = timeless(json.loads(path.read_text()), ignore)
        else:
            found[path.name] = path.read_bytes()
    found["checkpoints"] = sorted(p.name for p in (Path(directory) / "checkpoints").glob("*"))
    for path in sorted((Path(directory) / "weights").glob("*")):
        found[f"weights/{path.name}"] = path.read_bytes()
    return found


def unseal(directory):
    """Let ``results.jsonl`` be as older versions wrote it, so that a test may change it."""
    path = Path(directory) / "results.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    left_out = ("chain", "files")
    bare = [{k: v for k, v in event.items() if k not in left_out} for event in events]
    path.write_text("".join(f"{json.dumps(event)}\n" for event in bare))


def timeless(event, ignore=()):
    return {
        k: v
        for k, v in event.items()
        if k not in {"time", "chain", "files", *ignore, *MEASURED} and not k.endswith("seconds")
    }


def differences(a, b, ignore=()):
    """Names of the files in which two runs differ; a list of them, with what differs."""
    one, other = contents(a, ignore), contents(b, ignore)
    if ignore:
        for found in (one, other):
            for name in [n for n in found if n.startswith(("checkpoints", "weights"))]:
                del found[name]
    return [
        f"{name}: {_first_difference(one.get(name), other.get(name))}"
        for name in sorted({*one, *other})
        if one.get(name) != other.get(name)
    ]


def _first_difference(a, b):
    if isinstance(a, list) and isinstance(b, list):
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            if x != y:
                return f"line {i + 1}: {x} / {y}"
        return f"{len(a)} / {len(b)} lines"
    return f"{str(a)[:300]} / {str(b)[:300]}"


def final_weights(directory):
    """Bytes of every weight, bases and memories included, in the last checkpoint."""
    last = Checkpoints(Path(directory), CheckpointSettings()).paths()[-1]
    start = read_checkpoint(last)["start"]
    return dict(flat("", start))


def flat(where, value):
    """Pairs of the path to every leaf and the leaf, tensors as their shape and bytes."""
    if hasattr(value, "numpy"):
        yield where, (tuple(value.shape), value.numpy().tobytes())
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(f"{where}/{key}", inner)
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from flat(f"{where}/{i}", inner)
    else:
        yield where, value
