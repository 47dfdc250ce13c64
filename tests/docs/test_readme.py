"""What the README says about commands, files and code is true."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import hydra
import pytest

from cl_bench.cli.folders import conf_directory
from cl_bench.cli.words import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_strategy_of_the_readme_runs_as_it_is_printed(tmp_path):
    for language, comment in (("python", "# mine/halves.py"), ("yaml", "# mine/conf/strategy")):
        (block,) = re.findall(rf"```{language}\n({comment}.*?)```", README, re.DOTALL)
        path = tmp_path / block.splitlines()[0].removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block)
    (line,) = re.findall(r"^    (PYTHONPATH=mine python -m .*)$", README, re.MULTILINE)
    assignment, _, *arguments = shlex.split(line)
    short = ("stream.num_tasks=2", "trainer.max_epochs=1", "logger.mode=disabled", "run_dir=out")
    done = subprocess.run(
        [sys.executable, *arguments, *short],
        cwd=tmp_path,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{assignment.removeprefix('PYTHONPATH=')}{os.pathsep}{ROOT}",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/accuracy_matrix.csv").exists()


def commands():
    """Single runs that the README prints, without the ones on files of the reader's own."""
    others = ("-m ", "resume=", "reproduce=", "export=", "general=", "plan=")
    text = README.replace("\\\n", " ")
    lines = re.findall(r"^    python -m cl_bench (.*?)(?:\s+# .*)?$", text, re.MULTILINE)
    return [
        line
        for line in lines
        if line.strip() and not line.startswith(others) and line.split()[0] not in COMMANDS
    ]


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_readme_compose(line):
    with hydra.initialize_config_dir(str(conf_directory()), version_base="1.3"):
        cfg = hydra.compose("config", shlex.split(line))
    assert "strategy" in cfg
    assert "stream" in cfg


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_of_the_readme_lead_somewhere(target):
    assert (ROOT / target).exists()
