"""What `pip install .` puts elsewhere works without the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the installed wheel, outside the checkout."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), "."]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)]
    subprocess.run(install, cwd=folder, check=True, capture_output=True)
    return folder, wheel


def run(folder, *command):
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder / "site"),
        "OMP_NUM_THREADS": "1",
        "HYDRA_FULL_ERROR": "0",
    }
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_the_wheel_holds_every_module_and_config(installed):
    _, wheel = installed
    names = ZipFile(wheel).namelist()
    assert len(set(names)) == len(names)
    for package, suffix in (
        ("cl_bench", ".py"),
        ("cl_bench", ".txt"),
        ("cl_bench/tasks", ".py"),
        ("conf", ".yaml"),
    ):
        for path in (ROOT / package).rglob(f"*{suffix}"):
            inside = path.relative_to(ROOT).as_posix()
            assert (f"cl_bench/{inside}" if package == "conf" else inside) in names
    assert "cl_bench/tasks/images/load.py" in names
    top = {name.partition("/")[0] for name in names}
    assert [n for n in top if not n.endswith(".dist-info")] == ["cl_bench"]


def build(target, tree, folder):
    """What hatchling, the build backend, makes of a tree."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)


def test_the_source_distribution_makes_the_same_wheel(installed, tmp_path):
    assert build("sdist", ROOT, tmp_path).returncode == 0
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        assert all(member.isfile() for member in file)  # links are not what every reader makes
        file.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.glob("cl_bench-*/")
    done = build("wheel", tree, tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    made, direct = (
        {i.filename: i.CRC for i in ZipFile(w).infolist()} for w in (wheel, installed[1])
    )
    assert made == direct
    # A copy that has the link as text is refused: its wheel would hold no streams.
    shutil.rmtree(tree / "cl_bench/tasks")
    (tree / "cl_bench/tasks").write_text("../tasks")
    done = build("wheel", tree, tmp_path / "lost")
    assert done.returncode == 1
    assert "this copy has lost the link to ../tasks" in done.stderr


ALONE = """
import runpy, sys
from pathlib import Path
sys.path[:] = [p for p in sys.path if not (Path(p or ".") / "pyproject.toml").exists()]
sys.argv = ["cl_bench", *sys.argv[1:]]
runpy.run_module("cl_bench", run_name="__main__")
"""


def test_somebodys_own_folder_beside_the_wheel(installed):
    folder, _ = installed
    own = folder / "elsewhere"
    shutil.copytree(ROOT / "docs/own_folder", own, dirs_exist_ok=True)
    (own / "tasks.py").write_text("raise AssertionError('somebody else's tasks were imported')\n")
    alone = (sys.executable, "-c", ALONE)
    path = f"hydra.searchpath=[file://{own}/conf]"
    named = ["+strategy=halves", "+stream=stripes", "model=wide", "model.width=32"]
    short = ["stream.num_tasks=2", "trainer.max_epochs=1", "logger.mode=disabled"]
    out = run(folder, *alone, path, *named, *short, "run_dir=own")
    assert out.startswith("stripes · halves · seed 0: own\n")
    assert f"'{path}'" in (own / "own/command.txt").read_text()
    # The other way to say the same, and the listing.
    composed = run(folder, *alone, "--config-dir", "conf", *named, "--cfg", "job")
    for target in ("halves.Halves", "stripes.Stripes", "wide.Wide"):
        assert f"_target_: mine.{target}" in composed
    assert "how many stripes there are" in run(folder, *alone, "--config-dir", "conf")


def test_listing_and_run_from_another_directory(installed):
    folder, _ = installed
    code = "import sys, cl_bench.tasks as t; print(t.__path__[0], sys.modules['cl_bench'].__file__)"
    for path in run(folder, sys.executable, "-c", code).split():
        assert Path(path).is_relative_to(folder / "site")
    code = (
        "import sys, importlib.machinery as m; print(m.PathFinder.find_spec('tasks', sys.argv[1:]))"
    )
    assert run(folder, sys.executable, "-c", code, str(folder / "site")) == "None\n"
    script = str(folder / "site/bin/cl-bench")
    listing = run(folder, sys.executable, "-m", "cl_bench")
    assert "permuted_digits" in listing
    assert run(folder, sys.executable, script) == listing
    named = ["+strategy=gpm", "+stream=permuted_digits", "run_dir=out"]
    short = ["stream.num_tasks=1", "trainer.max_epochs=1", "logger.mode=disabled"]
    out = run(folder, sys.executable, script, *named, *short)
    assert out.startswith("permuted_digits · gpm · seed 0: out\n")
    assert (folder / "elsewhere/out/accuracy_matrix.png").is_file()
