"""What all tests share: reproducible randomness, and processes that do not share W&B's service."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from pair import Pair

from cl_bench.cli.main import main
from cl_bench.subspace import confinement

DATA_AT_HAND = Path(
    os.environ.get("CL_BENCH_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data"
)
"""Data sets, each in a folder of its name; tests that need one which is not there are skipped."""

settings.register_profile("cl_bench", deadline=None, derandomize=True, database=None)
settings.load_profile("cl_bench")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_wandb_service():
    """W&B names its service in the environment; a child that is killed would leave its run open."""
    os.environ.pop("WANDB_SERVICE", None)
    yield
    os.environ.pop("WANDB_SERVICE", None)


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """Two processes that learn cases of the contract together; their start takes seconds."""
    two = Pair(tmp_path_factory.mktemp("pair"))
    yield two
    two.close()


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs draw no figures."""
    module = sys.modules["cl_bench.experiment.conduct"]
    for name in ("write_figures", "write_probe_figures"):
        monkeypatch.setattr(module, name, lambda directory: [])


@pytest.fixture
def always_inputs(monkeypatch):
    """Project inputs wherever that is possible, however small the layer."""
    monkeypatch.setattr(confinement, "WORTHWHILE", float("-inf"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with nothing in it."""
    monkeypatch.setenv("CL_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """The entry point in this process, in an empty directory: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "1")

    def run(*arguments):
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", ["cl_bench", *arguments])
        status = main()
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def killed(tmp_path_factory):
    """A run that died in its second task; those who write into it take a copy."""
    from dying import die

    directory = tmp_path_factory.mktemp("killed") / "run"
    die(directory, dies_at=26)
    return directory


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, Debian's."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium or chromedriver here (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()
