"""What `pip install .` puts elsewhere works without the checkout."""

import os
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
    for package, suffix in (("cl_bench", ".py"), ("tasks", ".py"), ("conf", ".yaml")):
        for path in (ROOT / package).rglob(f"*{suffix}"):
            inside = path.relative_to(ROOT).as_posix()
            assert (f"cl_bench/{inside}" if package == "conf" else inside) in names
    assert not [n for n in names if n.startswith(("tests/", "conf/", "runs/", "docs/"))]


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
