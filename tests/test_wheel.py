"""What `pip install .` puts elsewhere works without the checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parent.parent


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
    names = set(ZipFile(wheel).namelist())
    for package, suffix in (
        ("cl_bench", ".py"),
        ("cl_bench", ".txt"),
        ("tasks", ".py"),
        ("conf", ".yaml"),
    ):
        for path in (ROOT / package).rglob(f"*{suffix}"):
            inside = path.relative_to(ROOT).as_posix()
            assert (f"cl_bench/{inside}" if package == "conf" else inside) in names
    assert not [n for n in names if n.startswith(("tests/", "conf/", "runs/", "docs/"))]


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
    code = "import cl_bench, tasks; print(cl_bench.__file__, tasks.__file__)"
    for path in run(folder, sys.executable, "-c", code).split():
        assert Path(path).is_relative_to(folder / "site")
    script = str(folder / "site/bin/cl-bench")
    listing = run(folder, sys.executable, "-m", "cl_bench")
    assert "permuted_digits" in listing
    assert run(folder, sys.executable, script) == listing
    named = ["+strategy=gpm", "+stream=permuted_digits", "run_dir=out"]
    short = ["stream.num_tasks=1", "trainer.max_epochs=1", "logger.mode=disabled"]
    out = run(folder, sys.executable, script, *named, *short)
    assert out.startswith("permuted_digits · gpm · seed 0: out\n")
    assert (folder / "elsewhere/out/accuracy_matrix.png").is_file()
