"""What the start pages print runs: their commands compose, their example's test passes."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import hydra
import pytest

from cl_bench.cli.main import conf_directory

ROOT = Path(__file__).resolve().parents[2]
OWN = ROOT / "docs/own_folder"
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs/start").glob("*.md"))}


def commands():
    """Runs and sweeps that the pages print, without those on files of the reader's own."""
    for name, page in PAGES.items():
        text = re.sub(r"\\\n\s*", "", page)
        for line in re.findall(
            r"^    python -m cl_bench ((?:--config-dir conf )?\S.*)$", text, re.M
        ):
            words = [w for w in shlex.split(line, comments=True) if w != "-m"]
            words = [w for w in words if not w.startswith("sweep_dir=")]  # not Hydra's
            if words[:2] == ["--config-dir", "conf"]:
                words = [*words[2:], f"hydra.searchpath=[file://{OWN}/conf]"]
            if any(w.startswith("+") for w in words) and "--config-dir" not in words:
                yield pytest.param(words, id=f"{name}: {line[:60]}")


@pytest.mark.parametrize("words", list(commands()))
def test_commands_of_the_start_pages_compose(words):
    words = [word.partition(",")[0] if "[" not in word else word for word in words]
    with hydra.initialize_config_dir(str(conf_directory()), version_base="1.3"):
        cfg = hydra.compose("config", words)
    assert "strategy" in cfg
    assert "stream" in cfg


def test_every_page_has_commands():
    ids = [one.id.partition(":")[0] for one in commands()]
    assert {name: ids.count(name) > 1 for name in PAGES} == dict.fromkeys(PAGES, True)
    assert len(PAGES) == 4


@pytest.fixture
def own_folder(monkeypatch):
    """The folder on the import path; runs leave pictures out."""
    conduct = importlib.import_module("cl_bench.experiment.conduct")
    monkeypatch.setattr(conduct, "write_figures", lambda directory: [])
    monkeypatch.setattr(conduct, "write_probe_figures", lambda directory: [])
    monkeypatch.syspath_prepend(str(OWN))
    yield OWN
    for name in [n for n in sys.modules if n.partition(".")[0] in ("mine", "test_halves")]:
        del sys.modules[name]


def test_the_examples_own_test_passes_and_can_fail(own_folder, tmp_path, monkeypatch):
    from mine.halves import Halves
    from test_halves import test_only_the_masked_half_moves as own_test

    own_test(tmp_path)
    monkeypatch.setattr(Halves, "constrain", lambda self, learner: None)
    with pytest.raises(AssertionError):
        own_test(tmp_path / "free")


def test_prompts_of_ones_own_are_learned(own_folder, tmp_path, cli):
    small = ["model=t5_tiny", "model.width=16", "model.depth=1", "optimizer=adamw"]
    short = ["trainer.max_epochs=1", "eval.max_samples=2", f"stream.data_dir={own_folder}/answers"]
    where = [f"hydra.searchpath=[file://{own_folder}/conf]", f"run_dir={tmp_path}/run"]
    status, out, err = cli(
        *where, "+strategy=er", "+stream=answers", *small, *short, "logger.mode=disabled"
    )
    assert status == 0, err
    assert "task 2/2 currencies" in out


def test_a_missing_file_of_answers_is_named(own_folder, tmp_path):
    from mine.answers import Answers

    from cl_bench.errors import UsageError

    with pytest.raises(UsageError, match=r"capitals/train\.jsonl: needs lines of"):
        Answers(str(tmp_path), ["capitals"])
