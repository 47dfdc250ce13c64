"""An offline W&B run of a sweep holds what the workspace in docs/ shows."""

import fnmatch
import json
import sys
from pathlib import Path

import pytest
import yaml
from wandb_files import history_rows, read_finished_wandb

from cl_bench.cli.main import main

WORKSPACE = Path(__file__).parents[2] / "docs" / "wandb_workspace.yaml"


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dashboard")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HYDRA_FULL_ERROR", "0")
        patch.delenv("WANDB_SERVICE", raising=False)
        arguments = ("-m", "+strategy=gpm", "+stream=permuted_digits", "stream.num_tasks=2")
        more = ("trainer.max_epochs=1", "seed=0", "sweep_dir=study")
        patch.setattr(sys, "argv", ["cl_bench", *arguments, *more])
        assert main() == 0
    return folder, read_finished_wandb(next(folder.rglob("offline-run-*/*.wandb")))


def panels():
    for section in yaml.safe_load(WORKSPACE.read_text())["sections"]:
        for panel in section["panels"]:
            yield pytest.param(panel, id=f"{section['name']}: {panel['title']} ({panel['type']})")


def summary(records):
    found = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            for item in record.summary.update:
                found["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return found


@pytest.mark.parametrize("panel", list(panels()))
def test_every_panel_has_something_to_show(records, panel):
    folder, found = records
    for key in panel["y"]:
        if panel["type"] == "line":
            rows = [r for r in history_rows(found) if panel["x"] in r and fnmatch.filter(r, key)]
            assert rows, f"{key} over {panel['x']}"
            values = [r[name] for r in rows for name in fnmatch.filter(r, key)]
            assert all(isinstance(value, int | float) for value in values)
        elif panel["type"] in ("bar", "scatter"):
            for wanted in (key, *([panel["x"]] if "x" in panel else [])):
                assert isinstance(summary(found)[wanted], int | float)
        else:
            kind = {"table": "table-file", "image": "images/separated"}[panel["type"]]
            media = [r for r in history_rows(found) if f"{key}/_type" in r]
            assert [m[f"{key}/_type"] for m in media] == [kind]
            paths = media[0].get(f"{key}/filenames") or [media[0][f"{key}/path"]]
            for path in paths:
                (file,) = folder.rglob(f"files/{path}")
                assert file.stat().st_size > 50


def test_the_table_is_the_accuracy_matrix(records):
    (table,) = records[0].rglob("files/**/accuracy_matrix*.table.json")
    found = json.loads(table.read_text())
    assert found["columns"] == ["after_task", "perm_0", "perm_1"]
    (matrix,) = records[0].rglob("accuracy_matrix.csv")
    rows = [[float(v) for v in line.split(",")] for line in matrix.read_text().splitlines()[1:]]
    assert found["data"] == rows


def test_the_run_knows_its_sweep_and_its_settings(records):
    run = next(r.run for r in records[1] if r.WhichOneof("record_type") == "run")
    assert run.run_group == "study"
    assert run.project == "cl_bench"
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["strategy"]["_target_"] == "cl_bench.strategies.projection.gpm.GPM"
    assert config["seed"] == 0
