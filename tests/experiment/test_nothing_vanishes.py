"""Whatever keeps a run from going on, what it recorded stays; what is damaged is named."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from dying import die, files, learn, refuses, same

from cl_bench.contracts import UsageError
from cl_bench.experiment import checkpoint as checkpoint_module
from cl_bench.experiment.checkpoint import read_checkpoint, write_checkpoint
from cl_bench.experiment.weights import read_weights
from cl_bench.report.study import read_study
from cl_bench.tracking import read_results, read_run, resume_record
from cl_bench.tracking.aside import Aside
from cl_bench.tracking.files import append_line

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished") / "run"
    learn(directory)
    for picture in directory.glob("*.png"):
        picture.unlink()
    return directory


@pytest.fixture
def run(killed, tmp_path):
    return Path(shutil.copytree(killed, tmp_path / "run"))


@pytest.fixture
def ended(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "ended"))


# --- checkpoints that cannot be used now ----------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:98] can't allocate memory: 8 bytes"),
        OSError(24, "Too many open files"),
        OSError(5, "Input/output error"),
    ],
)
def test_what_cannot_be_read_now_is_no_damage(run, monkeypatch, error):
    def fails(*arguments, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fails)
        refuses(run, r"cannot read the checkpoint .*task0001-step000000008\.pt now")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "_verify", fails)
        refuses(run, r"cannot read the checkpoint .*task0001-step000000008\.pt now")
    learn(run, resume=True)  # later it can


def test_another_format_is_refused_and_kept(run):
    for path in (run / "checkpoints").glob("*.pt"):
        state = {**read_checkpoint(path), "format": 1}
        with path.open("w+b") as file:
            write_checkpoint(file, state)
    refuses(run, r"has format 1, and this version of cl_bench reads 2")


def test_of_damaged_checkpoints_none_is_left(run):
    for path in (run / "checkpoints").glob("*.pt"):
        path.write_bytes(b"")
    refuses(run, r"no checkpoint to go on from: .*only 0 bytes long.*resume=.* from=start")


def test_a_damaged_checkpoint_is_moved_aside(run, tmp_path, capsys):
    newest = run / "checkpoints" / "task0001-step000000008.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    damaged = newest.read_bytes()
    learn(run, resume=True)
    assert "checkpoints/task0001-step000000008.pt: moved to" in capsys.readouterr().out
    (kept,) = (run / "superseded").rglob("*.pt")
    assert kept.read_bytes() == damaged


def test_checkpoints_that_are_gone_are_missed(run):
    shutil.rmtree(run / "checkpoints")
    refuses(run, "there is no checkpoint in .*checkpoints")


def test_a_disk_that_is_not_there_is_named(run):
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to("/nowhere/at/all")
    refuses(run, r"checkpoints leads to /nowhere/at/all, which is not there")


def test_a_run_without_checkpoints_says_so(tmp_path):
    die(tmp_path / "run", dies_at=26, enabled=False)
    before = files(tmp_path / "run")
    with pytest.raises(UsageError, match=r"checkpoint\.enabled=false"):
        learn(tmp_path / "run", resume=True, enabled=False)
    assert files(tmp_path / "run") == before


def test_a_checkpoint_of_another_past_is_not_used(run):
    """Two runs of one configuration may have events of the same lengths; their chains differ."""
    newest = run / "checkpoints" / "task0001-step000000008.pt"
    for path in (run / "checkpoints").glob("*.pt"):
        state = {**read_checkpoint(path), "chain": "0" * 16}
        with path.open("w+b") as file:
            write_checkpoint(file, state)
    refuses(run, f"{newest.name} cannot be used .* tells of another past")


def test_a_position_inside_a_line_is_not_used(run):
    for path in (run / "checkpoints").glob("*.pt"):
        state = read_checkpoint(path)
        state["position"] -= 3
        with path.open("w+b") as file:
            write_checkpoint(file, state)
    refuses(run, "is not the end of a line")


# --- beginning again ------------------------------------------------------------------------------


def test_from_the_start_moves_aside_what_was_there(run, finished, tmp_path):
    before = files(run)
    learn(run, resume="start")
    same(finished, run)
    after = files(run)
    (folder,) = (run / "superseded").iterdir()
    moved = files(folder)
    stays = {"config.yaml", "command.txt", "environment.json", "data.json"}
    assert moved == {k: v for k, v in before.items() if k not in stays}
    assert all(after[name] == before[name] for name in stays)


@pytest.mark.parametrize("moved", [0, 1, 3])
def test_whoever_is_stopped_while_beginning_again_can_do_so_again(run, finished, moved):
    """Killed after so many files were moved aside."""

    class Dies(Aside):
        def take(self, path):
            if len(self.moved) == moved:
                raise KeyboardInterrupt
            super().take(path)

    before = files(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cl_bench.tracking.opening.Aside", Dies)
        with pytest.raises(KeyboardInterrupt):
            learn(run, resume="start")
    if moved:
        refuses(run, r"results\.jsonl is missing; .*resume=.* from=start")
    learn(run, resume="start")
    same(finished, run)
    kept = [p.read_bytes() for p in (run / "superseded").rglob("*") if p.is_file()]
    assert all(c in kept for name, c in before.items() if not (run / name).exists())
    assert before["results.jsonl"] in kept


def test_a_line_is_added_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "log"
    append_line(path, "1")
    path.write_bytes(path.read_bytes() + b"hal")  # as a kill leaves it
    append_line(path, "2")
    assert path.read_bytes() == b"1\nhal\n2\n"

    def full(descriptor, content):
        os.write(descriptor, content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cl_bench.tracking.files.write", full)
    with pytest.raises(UsageError, match="No space left on device"):
        append_line(path, "3")
    assert path.read_bytes() == b"1\nhal\n2\n"


def test_a_run_that_never_had_a_checkpoint_begins_again(tmp_path, monkeypatch, finished):
    class EarlyError(BaseException): ...

    def dies(*arguments, **options):
        raise EarlyError

    with monkeypatch.context() as patch:
        patch.setattr("cl_bench.experiment.checkpoint.write_checkpoint", dies)
        with pytest.raises(EarlyError):
            learn(tmp_path / "run")
    learn(tmp_path / "run", resume=True)
    same(finished, tmp_path / "run")


def test_a_run_that_was_killed_before_its_first_event_begins_again(tmp_path, finished):
    began = ("config.yaml", "command.txt", "environment.json", "data.json")
    (tmp_path / "run").mkdir()
    for name in began:
        shutil.copy(finished / name, tmp_path / "run" / name)
    learn(tmp_path / "run", resume=True)
    same(finished, tmp_path / "run")


def test_events_that_a_resume_drops_stay_in_its_log(run):
    before = read_results(run)
    learn(run, resume=True)
    resumed = json.loads((run / "resumes.jsonl").read_text())
    kept = len(before) - len(resumed["dropped"])
    assert resumed["dropped"] == before[kept:]
    assert len(resumed["dropped"]) > 0
    assert read_results(run)[:kept] == before[:kept]


# --- results.jsonl --------------------------------------------------------------------------------


def lines_of(directory):
    return (directory / "results.jsonl").read_bytes().splitlines(keepends=True)


def change(lines):
    lines[2] = lines[2].replace(b'"learned": 0', b'"learned": 1')


def double(lines):
    lines.insert(3, lines[2])


def delete(lines):
    del lines[2]


def swap(lines):
    lines[2], lines[3] = lines[3], lines[2]


def unseal(lines):
    lines[3] = lines[3][: lines[3].rindex(b', "chain"')] + b"}\n"


def utf8(lines):
    lines[2] = b'{"event": "ep\xff' + lines[2][14:]


def number(lines):
    lines.insert(2, b"5\n")


def half(lines):
    lines[2] = lines[2][:20] + b"\n"


def longest_number(lines):
    lines[2] = b'{"event": "epoch", "steps": ' + b"1" * 5000 + b"}\n"


def windows(lines):
    lines[:] = [line.replace(b"\n", b"\r\n") for line in lines]


EDITS = {
    change: r"line 3: it is not what the run wrote after line 2",
    double: r"line 4: it stands there twice",
    delete: r"line 3: it is not what the run wrote after line 2",
    swap: r"line 3: it is not what the run wrote after line 2",
    unseal: r"line 4: it is not what the run wrote after line 3",
    utf8: r"line 3: not UTF-8",
    number: r"line 3: it holds no event",
    half: r"line 3: not JSON",
    longest_number: r"line 3: not JSON",
    windows: r"line 1: it is not what the run wrote",
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_line_that_the_run_did_not_write_is_named(run, edit):
    lines = lines_of(run)
    edit(lines)
    (run / "results.jsonl").write_bytes(b"".join(lines))
    refuses(run, r"results\.jsonl, " + EDITS[edit])


def test_every_single_byte_counts(run):
    """One flipped bit anywhere in a whole line is seen."""
    path = run / "results.jsonl"
    content = path.read_bytes()
    end = content.rindex(b"\n")
    for position in range(0, end, 37):
        changed = bytearray(content)
        changed[position] ^= 4
        path.write_bytes(bytes(changed))
        with pytest.raises(UsageError, match=r"results\.jsonl"):
            read_results(run)
    path.write_bytes(content[:-1] + b"\n" + b"\0" * 4096)  # what a power failure leaves
    assert len(read_results(run)) == content.count(b"\n")


def test_lines_of_older_versions_have_no_chain(run, finished):
    """They are read as they are; lines that follow them cover them."""
    bare = []
    for line in lines_of(run):
        event = json.loads(line)
        del event["chain"]
        bare.append(json.dumps(event).encode() + b"\n")
    (run / "results.jsonl").write_bytes(b"".join(bare))
    assert [e["event"] for e in read_results(run)][:2] == ["status", "evaluation"]
    record = resume_record(
        run,
        ["t0", "t1", "t2"],
        task_id_known=False,
        data={"fingerprint": "toy"},
        find=lambda lines: (lines[-1].end, 0.0, "here"),
    )
    record.status("more")
    record.close()
    sealed = lines_of(run)
    assert b"chain" in sealed[-1]
    assert b"chain" not in sealed[-2]
    sealed[1] = sealed[1].replace(b"evaluation", b"evaluatiox")
    (run / "results.jsonl").write_bytes(b"".join(sealed))
    with pytest.raises(UsageError, match="it is not what the run wrote"):
        read_results(run)


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({"event": "evaluation", "row": 99, "scores": {}}, "row 99 is none of this run's"),
        ({"event": "evaluation", "row": -1, "scores": {}}, "row .* is '-1'"),
        ({"event": "evaluation", "row": True, "scores": {}}, "row .* is 'True'"),
        ({"event": "evaluation", "row": 1, "scores": {"x": 0.5}}, "task 'x' is none of"),
        ({"event": "evaluation", "row": 1, "scores": {"t0": "x"}}, "scores .*'x'.*, not a number"),
        ({"event": "evaluation", "row": 1, "scores": {"t0": 10**400}}, "scores .* not a number"),
        (
            {"event": "evaluation", "row": 1, "scores": {}, "details": {"x": {}}},
            "task 'x' is none of",
        ),
        ({"evnt": "epoch"}, "it names no event"),
        ({"event": "status", "status": "started", "files": 5}, "files .* is '5'"),
        ({"event": "status", "status": "more", "files": {"../a.b": ""}}, "files .*not a SHA-256"),
        ({"event": "status", "status": "started", "seed": {}}, "seed .*not a whole number"),
        ({"event": "layers", "task": 0, "layers": {"fc": 5}}, "layers .*not numbers for each"),
        ({"event": "layers", "layers": {}}, "task .* is 'None'"),
        ({"event": "weights", "file": "/dev/zero"}, "learned .* is 'None'"),
        (
            {"event": "weights", "learned": 1, "file": "/dev/zero", "bytes": 0, "sha256": ""},
            "file .* is '/dev/zero', not a file in weights/",
        ),
        ({"event": "probe", "probe": "curve", "task": 0}, "values .* is 'None'"),
    ],
)
def test_events_of_older_versions_are_checked_for_what_they_tell(run, event, said):
    bare = [{k: v for k, v in json.loads(line).items() if k != "chain"} for line in lines_of(run)]
    bare.insert(2, event)
    (run / "results.jsonl").write_text("".join(json.dumps(e) + "\n" for e in bare))
    refuses(run, f"line 3: .*{said}")


def test_results_that_are_gone_are_missed(run, ended):
    for directory in (run, ended):
        (directory / "results.jsonl").unlink()
        refuses(directory, r"results\.jsonl is missing")


# --- other files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "data.json", "command.txt"])
def test_a_file_that_the_run_began_with_is_held_to_what_it_was(run, name):
    path = run / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refuses(run, name)
    path.unlink()
    refuses(run, "holds no run" if name == "config.yaml" else name)
    path.write_bytes(content.replace(b"0", b"7", 1) if b"0" in content else content + b" ")
    refuses(run, f"{name} is not as the run wrote it")


@pytest.mark.parametrize("name", ["summary.json", "accuracy_matrix.csv", "layers.csv", "data.json"])
def test_a_report_leaves_a_damaged_run_out_and_names_it(ended, finished, name):
    path = ended / name
    path.write_bytes(path.read_bytes().replace(b"t", b"x", 1))
    study = read_study([ended, finished])
    assert any(f"{ended}: " in line and name in line for line in study.left_out)
    assert [t.run.directory for row in study.rows() for t in row.trials] == [finished]


def test_a_report_misses_results_that_are_gone(ended, finished):
    (ended / "results.jsonl").unlink()
    study = read_study([ended, finished])
    assert any(f"{ended} " in line and "results.jsonl" in line for line in study.left_out)


def test_corrupt_weights_are_noticed(ended, finished):
    path = ended / "weights" / "task0002.safetensors"
    told = [e for e in read_results(ended) if e["event"] == "weights"]
    assert [e["learned"] for e in told] == [0, 1, 2, 3]
    assert read_weights(path, told[2]["sha256"])
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UsageError, match="its contents have changed since the run wrote it"):
        read_weights(path, told[2]["sha256"])
    study = read_study([ended, finished])
    assert any("task0002.safetensors is not as the run wrote it" in x for x in study.left_out)
    path.unlink()  # somebody needed the space
    assert not read_study([ended]).left_out


def test_what_was_superseded_is_no_run_of_its_own(run, finished):
    learn(run, resume="start")
    study = read_study([run.parent])
    assert len([t for row in study.rows() for t in row.trials]) == 1
    assert study.left_out == []


def test_tables_of_a_killed_run_may_lag_behind(run):
    """The matrix is written after its event: a kill between the two is no damage."""
    (run / "results.jsonl").write_bytes(b"".join(lines_of(run)[:-1]))  # what tells of its end
    path = run / "accuracy_matrix.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert read_run(run).status == "unfinished"
    path.write_text(path.read_text().replace("0,", "0,0.0123,", 1).replace(",0.0123", "", 0))
    with pytest.raises(UsageError, match=r"accuracy_matrix\.csv"):
        read_run(run)
