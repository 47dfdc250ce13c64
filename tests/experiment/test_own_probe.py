"""A probe is a file and a yaml: nothing of ours names it, and what is off makes no difference."""

import json
import sys

import hydra
import pytest
from omegaconf import OmegaConf

from cl_bench.cli.folders import conf_directory
from cl_bench.cli.sweep import _compared
from cl_bench.contracts import UsageError
from cl_bench.experiment import ProbeSettings, check_sharded
from cl_bench.experiment.probes.landscape import LandscapeSettings
from cl_bench.experiment.probes.recovery import RecoverySettings
from cl_bench.experiment.probes.updates import UpdateSettings
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.tracking import read_results
from cl_bench.tracking.reading import read_config
from cl_bench.tracking.renamed import PROBES

CONF = conf_directory()
TINY = ("+strategy=finetune", "+stream=permuted_digits", "stream.num_tasks=2")
QUICK = ("trainer.max_epochs=1", "logger.mode=disabled", "alignment.enabled=false")

CODE = """
from dataclasses import dataclass
from typing import Annotated

from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count
from cl_bench.experiment.observer import Observer
from cl_bench.experiment.probes.settings import ENABLED, Probe


@checked("probe.norms.")
@dataclass(frozen=True)
class Norms(Probe):
    enabled: bool = False
    digits: Annotated[Count, ENABLED] = 3

    def observer(self, scene):
        return Watching(self, scene.record)


class Watching(Observer):
    def __init__(self, options, record):
        self.options, self.record = options, record

    def after_task(self, learner, task):
        norm = sum(float(p.detach().norm()) for p in learner.parameters())
        values = {"norm": round(norm, self.options.digits)}
        self.record.probe("norms", task=task.index, values=values)
        return {}
"""
YAML = "# python -m cl_bench probe.norms.enabled=true\n# How large weights are\n"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a probe of somebody's own, beside which commands are given."""
    monkeypatch.setattr(sys.modules["cl_bench.experiment.conduct"], "write_figures", lambda _: [])
    (tmp_path / "conf/probe").mkdir(parents=True)
    (tmp_path / "conf/probe/norms.yaml").write_text(
        f"{YAML}_target_: own_norms.Norms\nenabled: false\ndigits: 3\n"
    )
    (tmp_path / "own_norms.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "--config-dir", "conf"
    sys.modules.pop("own_norms", None)


def composed(*words):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("config", [*words]), resolve=True)


def test_a_file_and_a_yaml_are_enough(cli, own, tmp_path):
    assert cli(*own, *TINY, *QUICK, "probe.norms.enabled=true", "run_dir=out")[0] == 0
    found = [e for e in read_results("out") if e.get("probe") == "norms"]
    assert [e["task"] for e in found] == [0, 1]
    seconds = json.loads((tmp_path / "out/summary.json").read_text())["probe_seconds"]
    assert set(seconds) == {"norms"}
    assert "  norms  " in cli(*own)[1], "it is listed"
    assert "  norms  " not in cli()[1], "where it is there"
    status, _, err = cli(*own, *TINY, *QUICK, "probe.norms.digits=0", "run_dir=bad")
    assert status == 2
    assert "probe.norms.digits=0: at least 1" in err
    status, _, err = cli(*own, *TINY, *QUICK, "probe.norms.digits=2", "run_dir=idle")
    assert status == 2
    assert "has no effect without probe.norms.enabled=true" in err
    # What is off is no difference to a run in which it was not there.
    assert cli(*own, "-m", *TINY, *QUICK, "sweep_dir=study")[0] == 0
    (tmp_path / "conf/probe/norms.yaml").unlink()
    status, out, err = cli("-m", *TINY, *QUICK, "sweep_dir=study")
    assert status == 0, err
    assert "was finished before" in out


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("probe.recovry.enabled=true", "Did you mean probe.recovery?"),
        ("+probe.recovry.enabled=true", "probe.recovry: there is no such probe. Did you mean"),
        ("probe=recovery", "switch one on, probe.<name>.enabled=true"),
        ("probe.recovery=null", "probe.recovery.enabled=false leaves it out"),
        ("probe.recovery._target_=torch.optim.SGD", "makes no probe"),
        ("probe.early=[3]", "first and last step"),
    ],
)
def test_what_is_no_probe_is_refused(cli, tmp_path, word, said):
    status, _, err = cli(*TINY, *QUICK, word, "run_dir=out")
    assert status == 2
    assert said in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", PROBES)
def test_a_record_of_before_has_the_probes_of_now(tmp_path, name):
    """They had no ``_target_``; that, and other options of one that is off, is no difference."""
    now = composed(*TINY, f"probe.{name}.enabled=true")
    before = json.loads(json.dumps(now))
    for node in before["probe"].values():
        if isinstance(node, dict):
            node.pop("_target_")
    off = next(other for other in now["probe"] if other not in (name, "early"))
    before["probe"][off]["samples"] = 9
    OmegaConf.save(before, tmp_path / "config.yaml")
    assert read_config(tmp_path)["probe"][name] == now["probe"][name]
    assert _compared(read_config(tmp_path)) == _compared(now)
    before["probe"][name]["enabled"] = False
    OmegaConf.save(before, tmp_path / "config.yaml")
    assert _compared(read_config(tmp_path)) != _compared(now)


@pytest.mark.parametrize("probe", [RecoverySettings, LandscapeSettings])
def test_a_probe_that_writes_says_so_and_needs_whole_weights(probe):
    with pytest.raises(UsageError, match=r"probe\.it writes to the network on the side"):
        check_sharded(Finetune(), ProbeSettings(it=probe(True)))
    check_sharded(Finetune(), ProbeSettings(it=probe(False), updates=UpdateSettings(True)))
