"""Runs the same small runs at two commits and compares what they recorded, bit for bit.

    python tests/compare_commits.py [BEFORE] [AFTER] --data /path/to/cl_benchmark --only gpm

By default from the branch's base to HEAD. Each commit gets a worktree under a temporary directory
and one process that has imported its code and forks a child for every run, with the packages of
this environment. Compared are the accuracy matrix, the weights after every task, all of the last
checkpoint's state (strategy, learner, observer, engine), and events and summary without times.
Strategies that the first commit does not have are left out. A run that both commits refuse alike is
said to be refused. Differences that somebody has declared, with a reason, in
``tests/declared_differences.yaml`` are shown apart, if the commit that brought them lies between
the two. Exit status 1 if there are others.
"""

import argparse
import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DECLARED = ROOT / "tests" / "declared_differences.yaml"

SMALL = (
    "trainer.max_epochs=1",
    "trainer.accelerator=cpu",
    "logger.mode=disabled",
)
DIGITS = ("stream.num_tasks=2", "batch_size=64")
CLASSES = ("stream.scenario=class", "stream.classes_per_task=2")
STREAMS = {
    "permuted_digits": DIGITS,
    "split_digits": (*DIGITS, *CLASSES, "pack=1"),
    "biography/smoke": (
        "stream.people=80",
        "stream.new_people=20",
        "stream.epochs=[1,1]",
        "stream.pretrain.steps=10",
        "stream.pretrain.warmup=2",
        "eval.dense=[]",
        "probe.early=[0,1]",
    ),
    "t5_cl_fewshot": (
        "model=t5_tiny",
        "search.enabled=true",  # the first tasks alone
        "search.tasks=2",
        "stream.prompt_length=64",
        "eval.max_samples=20",
    ),
}
FEDERATED = ("federation.clients=4", "federation.per_round=2", "federation.rounds=2")
FEDERATED_STREAMS = ("permuted_digits", "split_digits")
MORE = {
    "freeze": {"t5_cl_fewshot": ("strategy.tied=train",)},
    "fot_official": dict.fromkeys(FEDERATED_STREAMS, ("federation.statistics=sampled",)),
}
"""What a strategy needs to run on a stream."""

CLOCK = ("time", "chain", "files", "peak_memory_bytes", "peak_device_bytes", "inference_overhead")
STORED = ("checkpoint_bytes", "weights_bytes")
ABOUT = {"guards", "weights", "status"}
"""Events that tell of a run and its files, not what came of it."""


def cases(data):
    """Name and overrides of every run; what a strategy cannot learn, both commits refuse."""
    found = {}
    for path in sorted((ROOT / "conf" / "strategy").glob("*.yaml")):
        name = path.stem
        for stream, options in STREAMS.items():
            more = MORE.get(name, {}).get(stream, ())
            words = (f"+strategy={name}", f"+stream={stream}", *options, *SMALL)
            if stream == "t5_cl_fewshot":
                if data is None:
                    continue
                words = (*words, f"stream.data_dir={data}")
            if "local" in _engines(path):
                found[f"{name} {stream}"] = (*words, *more)
            if stream in FEDERATED_STREAMS and _engines(path) == {"streaming"}:
                found[f"{name} {stream} streaming"] = (*words, "+engine=streaming", *more)
            if stream in FEDERATED_STREAMS and "federated" in _engines(path):
                words = tuple(w for w in words if w != "pack=1")
                federation = ("+federation=small", *FEDERATED)
                found[f"{name} {stream} federated"] = (*words, *federation, *more)
    return found


@functools.cache
def _engines(path):
    from hydra.utils import get_class
    from omegaconf import OmegaConf

    return get_class(OmegaConf.load(path)["_target_"]).needs.engines


class Commit:
    """One commit's code, in a worktree, and the process that runs it."""

    def __init__(self, commit, directory):
        self.tree, self.runs = directory / "tree", directory / "runs"
        self.runs.mkdir(parents=True)
        git("worktree", "add", "--detach", "--quiet", str(self.tree), commit)
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(self.tree)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=directory,
            env={
                **os.environ,
                "PYTHONPATH": str(self.tree),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "XDG_CACHE_HOME": str(directory / "cache"),  # nothing of the other's is found
                "CL_BENCH_CACHE": str(directory / "cache"),
            },
        )

    def run(self, name, words):
        """Where the run is, and its exit status."""
        where = self.runs / name.replace("/", "-").replace(" ", "_")
        log = where.with_suffix(".log")
        self.process.stdin.write(json.dumps([str(log), *words, f"run_dir={where}"]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of {self.tree} ended; it must import the code there")
        return where, int(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        git("worktree", "remove", "--force", str(self.tree))


def serve(tree):
    """Fork a child for every command line that comes in."""
    import matplotlib.backends.backend_agg  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch._dynamo  # noqa: F401  # optimizers import it when they are first made

    import cl_bench.api
    from cl_bench.cli import main

    assert Path(cl_bench.__file__).is_relative_to(tree), cl_bench.__file__
    # Earlier commits import the streams by their folder's own name.
    name = "cl_bench.tasks" if (Path(tree) / "cl_bench" / "tasks").exists() else "tasks"
    tasks = importlib.import_module(name)
    assert Path(tasks.__file__).is_relative_to(tree), tasks.__file__
    for line in sys.stdin:
        log, *words = json.loads(line)
        child = os.fork()
        if child == 0:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            for descriptor in (1, 2):
                os.dup2(output, descriptor)
            sys.argv = ["cl_bench", *words]
            status = 70
            try:
                status = main()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


# -- comparing -------------------------------------------------------------------------------------


def results(directory):
    """Everything that came of a run, by name."""
    import torch
    from helpers.runs import flat
    from safetensors.torch import load_file

    found = {"matrix": (directory / "accuracy_matrix.csv").read_text()}
    for path in sorted((directory / "weights").glob("*.safetensors")):
        for key, tensor in load_file(path).items():
            found[f"{path.stem} weights: {key}"] = (tuple(tensor.shape), tensor.numpy().tobytes())
    last = sorted((directory / "checkpoints").glob("task*-step*.pt"))[-1]
    start = torch.load(last, weights_only=True, map_location="cpu")["start"]
    for key, value in flat("", start):
        if "seconds" not in key:
            found[f"state: {key.removeprefix('/')}"] = value
    counts = {}
    for line in (directory / "results.jsonl").read_text().splitlines():
        event = json.loads(line)
        kind = event["event"]
        if kind in ABOUT:
            continue
        counts[kind] = counts.get(kind, 0) + 1
        for key, value in numbers(event):
            found[f"event {kind}: {key} (no. {counts[kind]})"] = value
    summary = json.loads((directory / "summary.json").read_text())
    for key, value in numbers(summary):
        if key.split("/")[0] not in STORED:
            found[f"summary: {key}"] = value
    return found


def numbers(value, where=""):
    """Leaves of what JSON holds, without times."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in CLOCK and not key.endswith("seconds"):
                yield from numbers(inner, f"{where}/{key}" if where else key)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from numbers(inner, f"{where}/{i}")
    else:
        yield where, repr(value)


def compare(one, other):
    """Names of results that differ, or that only one has."""
    a, b = results(one), results(other)
    return [name for name in dict.fromkeys((*a, *b)) if a.get(name) != b.get(name)]


def last_line(directory):
    log = directory.with_suffix(".log").read_text().replace(str(directory), "").splitlines()
    return log[-1] if log else ""


def declared(before, after, path=DECLARED):
    """Entries whose commit lies between the two."""
    import yaml

    entries = yaml.safe_load(path.read_text()) if path.exists() else []
    return [
        entry
        for entry in entries or []
        if is_ancestor(entry["commit"], after) and not is_ancestor(entry["commit"], before)
    ]


def reason(run, result, entries):
    """Why the result may differ; None if nobody said so."""
    for entry in entries:
        if fnmatchcase(run, entry["runs"]) and any(
            fnmatchcase(result, p) for p in entry["results"]
        ):
            return str(entry["reason"])
    return None


def judge(name, words, before, after, entries):
    """A word, and lines: what differs and was not declared; what was, with reasons."""
    with ThreadPoolExecutor(2) as pool:
        (one, first), (other, second) = pool.map(lambda c: c.run(name, words), (before, after))
    if first or second:
        said = [last_line(one), last_line(other)]
        if first == second and said[0] == said[1] and first != 70:
            return "refused", [said[0]], []
        why = reason(name, "exit status", entries)
        lines = [f"exit status {first}: {said[0]}", f"exit status {second}: {said[1]}"]
        return ("DIFFERENT", lines, []) if why is None else ("declared", [], [why])
    found = compare(one, other)
    reasons = {result: reason(name, result, entries) for result in found}
    loose = [result for result, why in reasons.items() if why is None]
    known = sorted({why for why in reasons.values() if why is not None})
    for directory in (one, other):
        if not loose:
            shutil.rmtree(directory)
    return "DIFFERENT" if loose else "declared" if known else "identical", loose, known


def git(*words):
    return subprocess.run(
        ["git", *words], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def is_ancestor(one, other):
    done = subprocess.run(["git", "merge-base", "--is-ancestor", one, other], cwd=ROOT, check=False)
    return done.returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if nothing differs but what was declared."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", nargs="?", help="commit; by default where the branch left main")
    parser.add_argument("after", nargs="?", default="HEAD")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns, such as 'gpm *'")
    parser.add_argument("--data", type=Path, help="folder with lfpt5_fewshot/, for text")
    parser.add_argument("--list", action="store_true", help="name the runs and end")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.serve:
        serve(given.serve)
        return 0
    after = git("rev-parse", given.after)
    before = git("rev-parse", given.before) if given.before else git("merge-base", "main", after)
    known = {Path(f).stem for f in git("ls-tree", "--name-only", before, "conf/strategy/").split()}
    chosen = {
        name: words
        for name, words in cases(given.data and given.data.resolve()).items()
        if name.split()[0] in known and any(fnmatchcase(name, pattern) for pattern in given.only)
    }
    if given.list:
        print("\n".join(f"{name}: {' '.join(words)}" for name, words in chosen.items()))
        return 0
    entries = declared(before, after)
    directory = Path(tempfile.mkdtemp(prefix="cl_bench-commits-"))
    print(f"{len(chosen)} runs at {before[:9]} and {after[:9]} in {directory}", flush=True)
    both = [Commit(c, directory / kind) for c, kind in ((before, "before"), (after, "after"))]
    differing = []
    try:
        for name, words in chosen.items():
            begun = time.monotonic()
            verdict, lines, known = judge(name, words, *both, entries)
            print(f"{verdict:10} {name} ({time.monotonic() - begun:.1f} s)", flush=True)
            for line in [*lines[:8], *(f"declared: {why}" for why in known)]:
                print(f"           {line}", flush=True)
            if len(lines) > 8:
                print(f"           and {len(lines) - 8} more", flush=True)
            if verdict == "DIFFERENT":
                differing.append(name)
    finally:
        for commit in both:
            commit.close()
    if differing:
        print(f"{len(differing)} of {len(chosen)} differ; what they left is in {directory}")
        return 1
    shutil.rmtree(directory)
    print(f"nothing undeclared differs in {len(chosen)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
