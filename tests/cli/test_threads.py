"""How many threads a run computes with, and who decides."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from sweeps import TINY

from cl_bench.cli import threads
from cl_bench.contracts import UsageError

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def plain(monkeypatch):
    """No variable speaks of threads."""
    for name in (*threads.NUMBERS, *threads.WAITS):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def place(root, where, text):
    path = root / "sys/fs/cgroup" / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


QUOTAS = {
    "no group": ("", {}, 8),
    "none": ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n"}, 8),
    "own": ("0::/a/b\n", {"a/b/cpu.max": "300000 100000\n"}, 3),
    "around": ("0::/a/b\n", {"a/b/cpu.max": "600000 100000\n", "a/cpu.max": "250000 100000\n"}, 2),
    "less than a core": ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
    "container": ("0::/docker/7\n", {"cpu.max": "200000 100000\n"}, 2),
    "version 1": (
        "4:cpu,cpuacct:/a\n3:memory:/a\n",
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "400000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
        4,
    ),
    "version 1, none": ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1"}, 8),
    "both": (
        "1:memory:/\n0::/s\n",
        {"unified/s/cpu.max": "500000 100000"},
        5,
    ),
}


@pytest.mark.parametrize("kind", QUOTAS)
def test_cores_that_affinity_and_quota_leave(tmp_path, monkeypatch, kind):
    lines, files, cores = QUOTAS[kind]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(lines)
    for where, text in files.items():
        place(tmp_path, where, text)
    assert threads.usable_cores(tmp_path) == cores
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1}, raising=False)
    assert threads.usable_cores(tmp_path) == 1


def test_auto_takes_what_may_be_used_and_yields_to_the_environment(plain):
    plain.setattr(torch, "get_num_threads", lambda: 16)
    plain.setattr(threads, "usable_cores", lambda: 6)
    assert threads.chosen("auto") == 6
    assert threads.chosen("auto", processes=4) == 1
    assert threads.chosen(12) == 12  # who names a number gets it
    plain.setattr(threads, "usable_cores", lambda: 64)
    assert threads.chosen("auto") == 16
    plain.setenv("OMP_NUM_THREADS", "3")
    assert threads.chosen("auto") is None


@pytest.mark.parametrize("value", [0, -1, 1.5, "many", True, None])
def test_a_number_of_threads_that_makes_no_sense(value):
    with pytest.raises(UsageError, match=r"trainer\.threads=.*use auto, or a whole number"):
        threads.check_threads(value)


def test_threads_sleep_unless_it_is_too_late_or_somebody_else_decides(plain):
    threads.wait_passively()  # torch is there
    assert "OMP_WAIT_POLICY" not in os.environ
    plain.delitem(sys.modules, "torch")
    plain.setenv("GOMP_SPINCOUNT", "7")
    threads.wait_passively()
    assert "OMP_WAIT_POLICY" not in os.environ
    plain.delenv("GOMP_SPINCOUNT")
    plain.setenv("OMP_WAIT_POLICY", "x")  # so that it is put back
    plain.delenv("OMP_WAIT_POLICY")
    threads.wait_passively()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def environment(directory):
    return json.loads((Path(directory) / "environment.json").read_text())


def test_a_run_and_its_resume_compute_with_the_recorded_threads(cli, plain):
    before = torch.get_num_threads()
    seen = []
    original = torch.set_num_threads
    plain.setattr(torch, "set_num_threads", lambda n: (seen.append(n), original(n)))
    run = ("+strategy=finetune", *TINY, "run_dir=out")
    status, out, _ = cli(*run, "trainer.threads=3")
    assert (status, environment("out")["threads"], torch.get_num_threads()) == (0, 3, before)
    assert "threads:" not in out
    plain.setattr(threads, "usable_cores", lambda: 1)
    status, out, _ = cli("+strategy=finetune", *TINY, "run_dir=auto")
    assert (status, environment("auto")["threads"], torch.get_num_threads()) == (0, 1, before)
    assert out.count("trainer.threads=auto") == 1
    (Path("auto") / "summary.json").unlink()
    results = Path("auto/results.jsonl")
    results.write_text("".join(results.read_text().splitlines(True)[:-1]))
    original(before + 1)
    seen.clear()
    status, _, said = cli("resume=auto")
    assert status == 0, said
    assert set(seen[:-1]) == {1}  # the last one puts back what was
    assert torch.get_num_threads() == before + 1
    original(before)


def test_from_python_only_a_number_changes_anything(plain, tmp_path):
    from cl_bench import run

    before = torch.get_num_threads()
    plain.setattr(threads, "usable_cores", lambda: before + 3)
    overrides = [word for word in TINY if not word.startswith("+stream")]
    for setting, expected in (("auto", before), (before + 1, before + 1)):
        result = run(
            "permuted_digits",
            "finetune",
            overrides=[*overrides, f"trainer.threads={setting}"],
            run_dir=tmp_path / str(setting),
        )
        assert environment(result.directory)["threads"] == expected
        assert torch.get_num_threads() == before
    assert not any(name in os.environ for name in (*threads.NUMBERS, *threads.WAITS))
