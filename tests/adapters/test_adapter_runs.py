"""``adapter=`` on the command line: what is trained and recorded, and what may be exported."""

import csv

import pytest

from cl_bench.cli.export import _order, export, require_one_network
from cl_bench.contracts import UsageError
from cl_bench.experiment.weights import TaskWeights, read_weights

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("no_pictures")

RUN = (
    *("+strategy=finetune", "+stream=split_digits", "stream.num_tasks=2", "batch_size=100"),
    *("adapter=lora", "adapter.config.r=2", "trainer.max_epochs=1", "trainer.accelerator=cpu"),
    *("logger.mode=disabled", "alignment.enabled=false", "stream.scenario=task"),
)


@pytest.mark.parametrize("end", ["merge", "keep"])
def test_an_adapter_on_the_command_line_and_which_of_its_networks_are_exported(cli, tmp_path, end):
    status, out, err = cli(*RUN, f"adapter.end={end}", "run_dir=run")
    assert status == 0, err
    assert "finetune+lora" in out + err
    directory = tmp_path / "run"
    with open(directory / "layers.csv") as file:
        told = [row for row in csv.DictReader(file) if row["layer"] == "adapter"]
    weights = [read_weights(TaskWeights(directory).path(t)) for t in range(3)]
    matrices = [n for n, w in weights[0].items() if n.startswith("backbone") and w.dim() == 2]
    count = sum(2 * sum(weights[0][n].shape) for n in matrices)
    assert [float(row["parameters"]) for row in told] == [count, count]
    for name in matrices:
        assert not weights[2][name].equal(weights[1][name])
    if end == "merge":
        require_one_network(_order([f"export={directory}"]))
        return
    # After the second task the first is tested with its own adapter, which no file of weights has.
    for asked in ([], ["task=1"]):
        with pytest.raises(UsageError, match=r"Adapter \(adapter\) tests every .*adapter\.end=me"):
            export([f"export={directory}", *asked])
    assert not (directory / "export").exists()
    require_one_network(_order([f"export={directory}", "task=0"]))


def test_an_adapter_that_no_task_would_train_is_refused(cli, tmp_path):
    status, _, err = cli(*RUN, "strategy=ncm", "run_dir=run")
    assert status == 2
    assert "an adapter would learn nothing: leave adapter=... out" in err
    assert not (tmp_path / "run").exists()
