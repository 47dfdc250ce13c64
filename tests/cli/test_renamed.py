"""Records that call our classes by the names of earlier versions."""

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from hydra.utils import get_object
from omegaconf import OmegaConf

from cl_bench.cli.recorded import read_recorded
from cl_bench.cli.reproduce import reproduce
from cl_bench.cli.trust import Trust
from cl_bench.contracts import UsageError
from cl_bench.experiment.engine import LightningEngine
from cl_bench.report.study import read_study
from cl_bench.tracking import open_record
from cl_bench.tracking.reading import read_config
from cl_bench.tracking.renamed import RENAMED, renamed
from runs import unseal

pytestmark = pytest.mark.usefixtures("no_pictures")

TINY = (
    "-m",
    "+strategy=gpm",
    "+stream=permuted_digits",
    "stream.num_tasks=2",
    "trainer.max_epochs=1",
    "logger.mode=disabled",
    "sweep_dir=study",
)


@contextmanager
def earlier_version():
    """Inside, runs record the names of before, and die in their second task."""
    learned = LightningEngine.learn

    def opened(*arguments, config, **options):
        for name, now in RENAMED.items():
            config = config.replace(f"_target_: {now}\n", f"_target_: {name}\n")
        return open_record(*arguments, config=config, **options)

    def dying(engine, task, *arguments):
        if task.index == 1:
            raise RuntimeError("killed")
        return learned(engine, task, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["cl_bench.experiment.identity"], "open_record", opened)
        patch.setattr(LightningEngine, "learn", dying)
        yield


@pytest.mark.parametrize("name", RENAMED)
def test_what_has_moved_is_where_the_table_says(name):
    assert callable(get_object(RENAMED[name]))
    assert RENAMED[name] not in RENAMED


def test_a_run_of_before_resumes_compares_and_reproduces(cli):
    with earlier_version():
        assert cli(*TINY, "seed=0")[0] == 2
    (old,) = (p.parent for p in Path("study").rglob("config.yaml"))
    text = (old / "config.yaml").read_text()
    assert "_target_: tasks.permuted_digits.PermutedDigits" in text
    # The job has the settings of before: it is not refused, but goes on.
    status, out, err = cli(*TINY, "seed=0,1")
    assert status == 0, err
    assert f"{old.relative_to('study')}  goes on" in out
    assert "task0001" in (old / "resumes.jsonl").read_text()
    assert cli(*TINY, "seed=0,1")[1].count("was finished before") == 2
    assert (old / "config.yaml").read_text() == text  # what was recorded stays
    (block,) = read_study(["study"]).blocks
    (row,) = block.rows
    assert row.n == 2
    assert reproduce([f"reproduce={old}", "run_dir=again"])


def record(directory, **config):
    directory.mkdir()
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory


def test_a_strangers_module_of_that_name_is_not_ours(tmp_path, monkeypatch):
    """Names that we never had are left alone, and trusted no more than any other."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "tasks.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(own))
    for name in ("tasks.evil", "tasks.evil.Stream", "tasks.permuted_digits.evil", "tasks.s"):
        run = record(tmp_path / name, stream={"_target_": name})
        assert read_config(run)["stream"]["_target_"] == name
        with pytest.raises(UsageError, match="neither installed nor vouched for"):
            read_recorded("resume", run, Trust())


def test_names_are_mapped_where_they_name_something():
    node = {"a": [{"_target_": "tasks.text.Prompt"}], "name": "tasks.text.Prompt"}
    now = {"a": [{"_target_": "cl_bench.tasks.text.Prompt"}], "name": "tasks.text.Prompt"}
    assert renamed(node) == now
    assert renamed({"stream": {"object": "tasks.biography.stream.Biography", "people": 1}}) == {
        "stream": {"object": "cl_bench.tasks.biography.stream.Biography", "people": 1}
    }


def test_a_new_run_says_the_new_name(cli, tmp_path):
    (tmp_path / "conf/stream").mkdir(parents=True)
    node = {"_target_": "tasks.permuted_digits.PermutedDigits", "num_tasks": 2}
    OmegaConf.save(node, tmp_path / "conf/stream/mine.yaml")
    status, _, err = cli("--config-dir", "conf", "+strategy=gpm", "+stream=mine", "run_dir=out")
    assert status == 2
    assert err.startswith("error: stream._target_=tasks.permuted_digits.PermutedDigits: earlier ")
    assert "cl_bench.tasks.permuted_digits.PermutedDigits; write that" in err
    assert not (tmp_path / "out").exists()


def test_options_that_came_later_are_no_difference_as_long_as_nobody_sets_them(cli):
    assert cli(*TINY, "seed=0")[0] == 0
    (old,) = (p.parent for p in Path("study").rglob("config.yaml"))
    text = (old / "config.yaml").read_text()
    for name in ("identity_first", "validation_split", "at_task"):
        (line,) = [line for line in text.splitlines() if line.strip().startswith(f"{name}:")]
        text = text.replace(f"{line}\n", "")
    unseal(old)
    (old / "config.yaml").write_text(text)
    status, out, err = cli(*TINY, "seed=0")
    assert status == 0, err
    assert "was finished before" in out
    (line,) = [line for line in text.splitlines() if line.strip().startswith("num_tasks:")]
    (old / "config.yaml").write_text(text.replace(f"{line}\n", ""))
    status, _, err = cli(*TINY, "seed=0")
    assert status == 2
    assert "was run with stream.num_tasks=None, which is now 2" in err
