"""Lightning's loggers get what the files get, several at once; what is none is refused."""

import csv
import json

import pytest
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf
from recorded import learn_everything, opened

from cl_bench.cli.compose import composed
from cl_bench.cli.settings import sink_factories
from cl_bench.contracts import UsageError
from cl_bench.tracking import WandbSink, read_results
from cl_bench.tracking.lightning import LightningSink


def table(path):
    with path.open() as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_a_table_holds_every_score_where_it_belongs(tmp_path):
    directory = tmp_path / "run"

    def make():
        return CSVLogger(str(directory), "csv", "")

    with opened(directory, sinks=[LightningSink("csv", directory, make, {"seed": 3})]) as record:
        learn_everything(record)
        summary = record.finish()
    rows = table(directory / "csv" / "metrics.csv")
    told = {(int(r["step"]), k): float(v) for r in rows for k, v in r.items() if k != "step"}
    events = read_results(directory)
    scores = [e for e in events if e["event"] == "evaluation"]
    for event in scores:
        for name, score in event["scores"].items():
            assert told[event["row"], f"eval/{name}"] == pytest.approx(score)
    losses = [e["train_loss"] for e in events if e["event"] == "epoch"]
    assert [told[i + 1, "train/train_loss"] for i in range(len(losses))] == pytest.approx(losses)
    assert told[summary["tasks"], "summary/acc"] == pytest.approx(summary["acc"])


def sinks_of(*words, path):
    cfg, _ = composed(["+strategy=gpm", "+stream=permuted_digits", *words])
    made = [factory(path) for factory in sink_factories(cfg.logger, {})]
    return [s for s in made if s is not None]


def test_loggers_stand_side_by_side(tmp_path):
    assert [type(s) for s in sinks_of(path=tmp_path)] == [WandbSink]
    assert [s.name for s in sinks_of("logger=csv", path=tmp_path)] == ["csv"]
    both = sinks_of("logger=[wandb,csv]", "logger.also.csv.name=mine", path=tmp_path)
    assert [type(s) for s in both] == [WandbSink, LightningSink]
    both[1].start(["a"])
    both[1].event({"event": "evaluation", "row": 0, "scores": {"a": 0.5}})
    assert (tmp_path / "mine" / "metrics.csv").exists()
    off = sinks_of("logger=[wandb,csv]", "logger.mode=disabled", path=tmp_path)
    assert [s.name for s in off] == ["csv"]


def test_what_is_no_logger_is_refused(tmp_path, monkeypatch):
    wrong = OmegaConf.create({"logger": {"also": {"x": {"_target_": "torch.nn.Linear"}}}})
    with pytest.raises(UsageError, match=r"logger.also.x._target_=torch.nn.Linear: makes no log"):
        sink_factories(wrong.logger, {})
    nameless = OmegaConf.create({"logger": {"also": {"x": {"save_dir": "a"}}}})
    with pytest.raises(UsageError, match=r"logger\.also\.x: name one of Lightning's loggers"):
        sink_factories(nameless.logger, {})
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(UsageError, match=r"logger=tensorboard: needs a package"):
        sinks_of("logger=tensorboard", path=tmp_path)
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == "[]"
