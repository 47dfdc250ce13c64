"""Commands that are first words: which there are, what they are told, what they end with."""

import re

import pytest
from studies import make_run

from cl_bench.cli.words import COMMANDS, command
from cl_bench.errors import UsageError
from cl_bench.report.__main__ import NAMES as FILES
from cl_bench.report.__main__ import main as report


def test_every_word_has_a_command_and_stands_in_the_listing(cli):
    assert all(callable(command([word])) for word in COMMANDS)
    status, out, _ = cli("--help")
    assert status == 0
    listed = out.split("commands  python -m cl_bench")[1].split("\n\n")[0]
    assert re.findall(r"(?m)^  (\w+) ", listed) == list(COMMANDS)


@pytest.mark.parametrize("word", COMMANDS)
def test_a_word_explains_itself(word, cli, capsys):
    try:
        status, out, _ = cli(word, "--help")
    except SystemExit as end:  # argparse's
        status, out = end.code, capsys.readouterr().out
    assert status == 0
    assert f"python -m cl_bench {word}" in out


def test_the_report_by_its_word_is_the_old_one(cli, tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / f"runs/{seed}", "gpm", seed, [0.5, 0.6, 0.7])
    status, out, _ = cli("report", "runs", "--out", "new")
    assert status == 0
    assert "new/report.html" in out
    assert report(["runs", "--out", "old"]) == 0
    for name in FILES[1:]:
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "old" / name).read_bytes()
    assert cli("report", "nowhere")[0] == 2


@pytest.mark.parametrize(("word", "said"), [("rapport", "did you mean report?"), ("gpm", "merge")])
def test_a_word_that_is_no_command(word, said, cli):
    status, _, err = cli(word, "runs")
    assert status == 2
    assert f"error: {word}: there is no such command" in err
    assert said in err


def test_overrides_and_flags_are_no_words():
    for words in ([], ["+strategy=gpm"], ["seed=1"], ["-m", "report"], ["~pack"], ["--cfg", "job"]):
        assert command(words) is None
    with pytest.raises(UsageError):
        command(["strategy"])
