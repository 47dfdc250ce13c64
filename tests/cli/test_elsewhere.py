"""Runs are reproduced, exported and started from Python; nothing of it needs the command line."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import make_stream, mlp

import cl_bench
from cl_bench import run
from cl_bench.cli import main
from cl_bench.cli.export import export
from cl_bench.cli.reproduce import REPORT, reproduce
from cl_bench.cli.resume import resume
from cl_bench.contracts import UsageError
from cl_bench.experiment.determinism import deterministically, statement
from cl_bench.experiment.weights import TaskWeights, encoded, read_weights
from cl_bench.report.comparison import compare_runs
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.tasks.permuted_digits import PermutedDigits
from cl_bench.tasks.split_digits import SplitDigits
from cl_bench.tracking import read_matrix
from runs import differences, unseal

pytestmark = pytest.mark.usefixtures("no_pictures")

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("trainer.max_epochs=1", "trainer.accelerator=cpu", "logger.mode=disabled")
SPLIT = ("stream.num_tasks=3", "batch_size=20", *SHORT)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    directory = tmp_path_factory.mktemp("split") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["cl_bench.experiment.conduct"], "write_figures", lambda _: [])
        run("split_digits", "gpm", overrides=SPLIT, run_dir=directory)
    return directory


def elsewhere(folder, code, *arguments):
    """Run code in a process that has none of our packages; returns what it prints."""
    absent = "import sys; sys.modules.update(dict.fromkeys(('cl_bench',)))\n"
    done = subprocess.run(
        [sys.executable, "-c", absent + code, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- reproduce ------------------------------------------------------------------------------------


def test_a_run_is_reproduced_from_its_record(tmp_path, split, capsys):
    assert reproduce([f"reproduce={split}", f"run_dir={tmp_path / 'again'}"])
    (tmp_path / "again" / REPORT).rename(tmp_path / REPORT)
    assert differences(split, tmp_path / "again") == []
    said = capsys.readouterr().out
    assert f"identical: {tmp_path / 'again'} has the matrix, events, summary and weights of" in said
    assert "what differs around it: nothing" in said
    report = json.loads((tmp_path / REPORT).read_text())
    assert (report["identical"], report["differences"]) == (True, [])


def test_a_reproduction_that_differs_says_by_how_much_and_what_is_different(
    tmp_path, split, capsys, monkeypatch
):
    other = tmp_path / "other"
    shutil.copytree(split, other)
    unseal(other)
    matrix = (other / "accuracy_matrix.csv").read_text()
    first = matrix.splitlines()[2].split(",")[1]
    (other / "accuracy_matrix.csv").write_text(matrix.replace(first, str(float(first) - 0.25), 1))
    environment = json.loads((other / "environment.json").read_text())
    environment["packages"]["torch"] = "1.0"
    (other / "environment.json").write_text(json.dumps(environment))
    monkeypatch.setattr(sys, "argv", ["x", f"reproduce={other}", f"run_dir={tmp_path / 'again'}"])
    assert main() == 1
    said = capsys.readouterr().out
    assert f"different: {tmp_path / 'again'} is not the same as {other}" in said
    assert "accuracy matrix: 1 value(s) differ, by up to 0.25 (R[1, classes_0-1]: " in said
    assert f"what differs around it: torch 1.0 -> {torch.__version__}" in said


def test_what_is_compared(tmp_path, split):
    other = tmp_path / "other"
    shutil.copytree(split, other)
    assert compare_runs(split, other) == []
    unseal(other)
    lines = (other / "results.jsonl").read_text().splitlines()
    event = next(i for i, line in enumerate(lines) if '"epoch"' in line)
    changed = {**json.loads(lines[event]), "train_loss": 9.0, "seconds": 1e9, "time": "later"}
    lines[event] = json.dumps(changed)
    (other / "results.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    weights = TaskWeights(other)
    moved = load_file(weights.path(2))
    moved["heads.0.weight"][0, 0] += 1.0
    save_file(moved, weights.path(2))
    found = {d.what: d for d in compare_runs(split, other)}
    assert set(found) == {"events", "weights after 2 tasks"}
    assert found["events"].count == 2  # the loss, and the line that is missing
    assert found["weights after 2 tasks"].count == 1
    assert found["weights after 2 tasks"].largest == pytest.approx(1.0)


def test_only_what_is_stored_may_differ(tmp_path, split):
    with pytest.raises(UsageError, match=r"seed=3: reproduce=\.\.\. runs what was recorded"):
        reproduce([f"reproduce={split}", "seed=3"])
    with pytest.raises(UsageError, match=r"no such setting; there are checkpoint\.enabled"):
        reproduce([f"reproduce={split}", "checkpoint.kept=3"])
    with pytest.raises(UsageError, match="holds no run"):
        reproduce([f"reproduce={tmp_path}"])
    unfinished = tmp_path / "unfinished"
    shutil.copytree(split, unfinished)
    lines = (unfinished / "results.jsonl").read_text().splitlines()
    (unfinished / "results.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(UsageError, match=r"not finished.*resume="):
        reproduce([f"reproduce={unfinished}"])


# --- deterministic=true ---------------------------------------------------------------------------


def test_deterministic_is_said_recorded_and_undone(tmp_path, capsys):
    seen = []

    class Watching(GPM):
        def setup(self, learner, task):
            seen.append(torch.are_deterministic_algorithms_enabled())
            super().setup(learner, task)

    run(
        "split_digits", Watching(), overrides=(*SPLIT, "deterministic=true"), run_dir=tmp_path / "r"
    )
    assert seen == [True] * 3
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    promise = statement(asked=True, on_cuda=False)
    assert promise in " ".join(capsys.readouterr().out.split())
    environment = json.loads((tmp_path / "r" / "environment.json").read_text())
    assert environment["reproducible"] == promise
    assert environment["threads"] == torch.get_num_threads()


def test_an_operation_without_a_deterministic_algorithm_is_refused():
    twice = torch.tensor([0, 0])
    refused = pytest.raises(UsageError, match=r"deterministic=true: .*deterministic=false")
    with refused, deterministically(True):
        torch.zeros(2).put_(twice, torch.tensor([1.0, 2.0]))
    with pytest.raises(RuntimeError, match="shape"), deterministically(True):
        raise RuntimeError("shape")
    with deterministically(False):
        torch.zeros(2).put_(twice, torch.tensor([1.0, 2.0]))


# --- export ---------------------------------------------------------------------------------------

SCORE = """
import torch
from safetensors.torch import load_file
network = torch.export.load(sys.argv[1] + "/network.pt2").module()
for part in sys.argv[2:]:
    data = load_file(part)
    first, stop = data["columns"].tolist()
    logits = network(data["x"])
    assert torch.equal(network(data["x"][:1]).round(decimals=3), logits[:1].round(decimals=3))
    print(float((logits[:, first:stop].argmax(1) + first == data["y"]).double().mean()))
"""


def store(tmp_path, tasks):
    """Test data as plain tensors; returns the files."""
    paths = []
    for task in tasks:
        batch = task.test[torch.arange(len(task.test))]
        columns = torch.tensor([task.classes.start, task.classes.stop])
        paths.append(tmp_path / f"{task.name}.safetensors")
        save_file({"x": batch["x"].contiguous(), "y": batch["y"], "columns": columns}, paths[-1])
    return paths


def test_an_exported_network_scores_elsewhere_what_the_record_says(tmp_path, split, capsys):
    folder = export([f"export={split}", "task=2", f"to={tmp_path / 'out'}"])
    assert {p.name for p in folder.iterdir()} == {
        "README.md", "model.safetensors", "network.pt2", "run.yaml",
    }  # fmt: skip
    stream = SplitDigits(num_tasks=3)
    out = elsewhere(tmp_path, SCORE, folder, *store(tmp_path, stream[:2]))
    _, R = read_matrix(split)
    assert [float(line) for line in out.split()] == pytest.approx(R[2, :2].tolist())
    card = (folder / "README.md").read_text()
    for said in (
        "# split_digits after 2 of 3 tasks, strategy gpm",
        "CC BY 4.0",
        "doi:10.24432/C50P49",
        "was **known** at test time",
        "head 1, task classes_2-3: 2:4",
        "heads of 1 later task(s) are untrained and left out",
        f"| learned | classes_2-3 | 2 | {R[2, 1]:.4f} | accuracy |",
    ):
        assert said in card
    # The network as the checkpoint has it, not merely one that scores the same.
    weights = read_weights(TaskWeights(split).path(2))
    exported = load_file(folder / "model.safetensors")
    assert set(weights) - set(exported) == {"heads.2.weight"}
    assert all(torch.equal(exported[name], weights[name]) for name in exported)
    assert "2 task(s)" in capsys.readouterr().out
    with pytest.raises(UsageError, match="is there already"):
        export([f"export={split}", "task=2", f"to={folder}"])


def test_a_shared_head_and_convolutions_elsewhere(tmp_path):
    named = ("permuted_digits", "finetune", "cnn_small")
    cut = ("stream.num_tasks=2", "batch_size=50", "pack=1", "model.channels=[4,8]", *SHORT)
    result = run(*named, overrides=cut, run_dir=tmp_path / "run")
    folder = export([f"export={tmp_path / 'run'}"])
    assert folder == tmp_path / "run" / "export" / "task0002"
    stored = store(tmp_path, PermutedDigits(num_tasks=2))
    out = elsewhere(tmp_path, SCORE, folder, *stored)
    assert [float(line) for line in out.split()] == pytest.approx(result.matrix[2].tolist())
    assert "Output column i is class i, of 10, in any task" in (folder / "README.md").read_text()


def test_which_tasks_can_be_exported(tmp_path, split):
    with pytest.raises(UsageError, match=r"task=4: counts the tasks learned.*\(before any\) to 3"):
        export([f"export={split}", "task=4"])
    with pytest.raises(UsageError, match="takes task="):
        export([f"export={split}", "epoch=4"])
    with pytest.raises(UsageError, match="holds no run"):
        export([f"export={tmp_path}"])
    last = ("checkpoint.weights=last", "checkpoint.keep=1")
    run("split_digits", "finetune", overrides=(*SPLIT, *last), run_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "weights").exists()
    with pytest.raises(UsageError, match=r"task=1: .*\(it keeps: 3\).*checkpoint\.weights=all"):
        export([f"export={tmp_path / 'run'}", "task=1"])
    assert (export([f"export={tmp_path / 'run'}"]) / "network.pt2").exists()
    summary = json.loads((split / "summary.json").read_text())
    assert summary["weights_bytes"] == TaskWeights(split).nbytes
    shutil.copytree(split, tmp_path / "copy")
    path = TaskWeights(tmp_path / "copy").path(1)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UsageError, match="is damaged"):
        export([f"export={tmp_path / 'copy'}", "task=1"])


def test_weights_of_a_strategy_that_gives_each_task_its_own_are_refused(tmp_path):
    run("split_digits", "trgp", overrides=SPLIT, run_dir=tmp_path / "run")
    with pytest.raises(UsageError, match=r"TRGP .* tests every task with weights of its own"):
        export([f"export={tmp_path / 'run'}", "task=2"])
    assert (export([f"export={tmp_path / 'run'}", "task=0"]) / "network.pt2").exists()


def test_a_network_that_does_not_answer_itself_is_refused(tmp_path):
    run("split_digits", "ncm", overrides=SPLIT, run_dir=tmp_path / "run")
    with pytest.raises(UsageError, match=r"NCM \(strategy\) answers at test itself"):
        export([f"export={tmp_path / 'run'}", "task=2"])


def test_a_language_model_loads_in_transformers_alone(tmp_path):
    pytest.importorskip("transformers")
    tiny = ("stream.pretrain.steps=10", "stream.epochs=[1,1]", "stream.people=40")
    more = ("stream.new_people=8", "stream.strangers=8", *SHORT[1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        result = run(
            "biography/smoke", "finetune", overrides=(*tiny, *more), run_dir=tmp_path / "run"
        )
    folder = export([f"export={tmp_path / 'run'}"])
    batch = {"input_ids": torch.arange(24).reshape(2, 12)}
    learner = result.learner.eval()
    with torch.no_grad():
        save_file({**batch, "logits": learner(batch)}, tmp_path / "asked.safetensors")
    code = """
import json, torch
from safetensors.torch import load_file
from transformers import GPTNeoXForCausalLM
asked = load_file("asked.safetensors")
model = GPTNeoXForCausalLM.from_pretrained(sys.argv[1])
logits = model(input_ids=asked["input_ids"]).logits
print(float((logits - asked["logits"]).abs().max()))
print(len(json.load(open(sys.argv[1] + "/vocabulary.json"))) <= logits.shape[2])
"""
    worst, known = elsewhere(tmp_path, code, folder).split()[-2:]
    assert float(worst) < 1e-5
    assert known == "True"
    assert "GPTNeoXForCausalLM.from_pretrained" in (folder / "README.md").read_text()


def test_weights_that_share_memory_are_stored_once(tmp_path):
    table = torch.randn(50, 8)
    tied = {"embed": table, "head": table, "view": table[:2], "scalar": torch.tensor(3)}
    (tmp_path / "w.safetensors").write_bytes(encoded(tied))
    assert (tmp_path / "w.safetensors").stat().st_size < 2 * table.nbytes
    found = read_weights(tmp_path / "w.safetensors")
    assert all(torch.equal(found[name], tied[name]) for name in tied)


# --- from Python ----------------------------------------------------------------------------------


def test_importing_the_package_costs_nothing():
    code = "import sys, cl_bench\nprint('torch' in sys.modules, 'hydra' in sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]
    with pytest.raises(AttributeError, match="no attribute 'walk'"):
        cl_bench.walk  # noqa: B018


def test_objects_and_names_come_to_the_same(tmp_path, split):
    strategy = GPM(threshold=0.95)
    results = [
        run("split_digits", strategy, overrides=SPLIT, run_dir=tmp_path / str(i)) for i in (0, 1)
    ]
    for result in results:  # twice the same: the object was not used up
        (result.directory / "choices.json").unlink()  # the same, in another order
        (only,) = differences(split, result.directory)
        assert only.startswith("choices.json")
        assert result.summary["acc"] == pytest.approx(result.matrix[-1].mean())
    assert strategy.memory == {}
    assert results[0].strategy.memory != {}
    names, matrix = read_matrix(split)
    assert len(names) == 3
    assert (results[0].matrix[1:, 0] == matrix[1:, 0]).all()


def test_everything_as_an_object(tmp_path):
    stream = make_stream()
    options = {
        "overrides": ("batch_size=10", "trainer.max_epochs=2", *SHORT[1:]),
        "optimizer": functools.partial(torch.optim.SGD, lr=0.05),
        "seed": 2,
    }
    result = run(stream, GPM(samples=20), mlp(), run_dir=tmp_path / "run", **options)
    assert result.matrix.shape == (4, 3)
    assert result.matrix[3, 2] > 0.9
    config = (tmp_path / "run" / "config.yaml").read_text()
    for said in (
        "contracts.stream.Stream",
        "cl_bench.strategies.projection.gpm.GPM",
        "torch.optim.sgd.SGD",
        "lr: 0.05",
    ):
        assert said in config
    command = (tmp_path / "run" / "command.txt").read_text()
    assert command.startswith("cl_bench.run(stream=<cl_bench.contracts.stream.Stream>, strategy=<")
    with pytest.raises(UsageError, match=r"its .* came from Python code as objects"):
        reproduce([f"reproduce={tmp_path / 'run'}"])
    # The network itself is not known to the record: its weights are exported, and that is said.
    folder = export([f"export={tmp_path / 'run'}", "task=1"])
    assert {p.name for p in folder.iterdir()} == {"README.md", "model.safetensors", "run.yaml"}
    assert "without the architecture: the model was an object" in (folder / "README.md").read_text()


def test_a_run_of_objects_goes_on(tmp_path):
    class Mortal(GPM):
        left = 10**9

        def constrain(self, learner):
            if Mortal.left == 0:
                raise KeyboardInterrupt
            Mortal.left -= 1
            super().constrain(learner)

    def start(directory, **options):
        cut = (*SPLIT, "pack=1", "checkpoint.every_steps=5")
        return run("split_digits", Mortal(), overrides=cut, run_dir=directory, **options)

    whole = start(tmp_path / "whole")
    Mortal.left = 25
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "run")
    Mortal.left = 10**9
    with pytest.raises(UsageError, match=r"go on with cl_bench\.run\(.*resume=True"):
        resume([f"resume={tmp_path / 'run'}"])
    again = start(tmp_path / "run", resume=True)
    assert (again.matrix[1:, 0] == whole.matrix[1:, 0]).all()
    assert differences(tmp_path / "whole", tmp_path / "run") == []


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"strategy": GPM}, r"strategy=GPM: give an object, GPM\(\.\.\.\)"),
        ({"strategy": 3}, "strategy=3: give a name, or a Strategy"),
        ({"strategy": "gmp"}, r"\+strategy=gmp: there is no such strategy. Did you mean"),
        ({"strategy": "gpm", "model": "mpl"}, "model=mpl: there is no such model"),
        ({"strategy": "gpm", "optimizer": 0.1}, "optimizer=0.1: give a name, or what builds one"),
        ({"strategy": "gpm", "resume": True}, "resume=True: say which run"),
        ({"strategy": "gpm", "overrides": "x=1"}, "overrides='x=1': give a list"),
        ({"strategy": "gpm", "overrides": None}, "overrides=None: give a list"),
        ({"strategy": "gpm", "overrides": {"seed": 3}}, "overrides={'seed': 3}: give a list"),
        ({"strategy": "gpm", "overrides": [3]}, r"overrides=\[3\]: give a list"),
        ({"strategy": "gpm", "overrides": ["seed=4"], "seed": 3}, "seed=4: has no effect beside"),
        ({"strategy": "gpm", "overrides": ["run_dir=x"], "run_dir": "y"}, "no effect beside run_d"),
        ({"strategy": GPM(), "overrides": ["strategy.threshold=0.5"]}, "strategy is given as an"),
        ({"strategy": GPM(), "overrides": ["+strategy=ewc"]}, "strategy is given as an object"),
        (
            {"strategy": "gpm", "model": torch.nn.Flatten(), "overrides": ["widths=[3]"]},
            "model is given",
        ),
        ({"strategy": "gpm", "seed": "3"}, "seed='3': must be a whole number"),
        ({"strategy": "gpm", "run_dir": 3}, "run_dir=3: give a path"),
        ({"strategy": "gpm", "resume": "yes", "run_dir": "y"}, "resume=.yes.: use False, True or"),
        ({"strategy": ""}, r"\+strategy=: choose one of"),
        ({"strategy": "gpm", "overrides": ["trainer.epochs=3"]}, "trainer.epochs=3: there is no"),
    ],
)
def test_mistakes_in_python_are_one_message(parts, said):
    with pytest.raises(UsageError, match=said):
        run("split_digits", **parts)
