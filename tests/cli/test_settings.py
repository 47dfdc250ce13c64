"""Whatever is wrong with a setting is said in one line, before there is a run directory."""

import copy
import functools
import math
import re
import sys

import hydra
import pytest
import torch
from omegaconf import OmegaConf, open_dict

from cl_bench.cli import run as running
from cl_bench.cli.explain import refuse_empty, refuse_lists
from cl_bench.cli.folders import conf_directory
from cl_bench.contracts import UsageError
from cl_bench.strategies.isolation.freeze import Freeze
from cl_bench.strategies.merging.task_vector import TaskVector
from cl_bench.strategies.penalty.ewc import EWC
from cl_bench.strategies.projection.gpm import GPM
from cl_bench.strategies.replay.er import ER
from cl_bench.tasks.permuted_digits import PermutedDigits

QUICK = ("stream.num_tasks=2", "trainer.max_epochs=1", "logger.mode=disabled", "+widths=[8]")


class ReachedError(Exception):
    """Everything was accepted: training would begin."""


@functools.cache
def composed(*words):
    with hydra.initialize_config_dir(str(conf_directory()), version_base="1.3"):
        return hydra.compose("config", [*words])


@pytest.fixture
def begin(monkeypatch, tmp_path):
    """Goes as far as a run directory; gives what would be said where the run begins."""

    def stop(*_, notes, **__):
        raise ReachedError(notes)

    monkeypatch.setattr(running, "conduct", stop)
    monkeypatch.chdir(tmp_path)

    def run(name="gpm", stream="permuted_digits", more=(), typed=(), /, **values):
        cfg = copy.deepcopy(composed(f"+strategy={name}", f"+stream={stream}", *more, *QUICK))
        with open_dict(cfg):
            for key, value in values.items():
                OmegaConf.update(cfg, key, value, force_add=True)
        words = [f"{key}={value}" for key, value in values.items()] if typed == () else typed
        try:
            running.run_config(cfg, "", {"strategy": name}, words=words)
        except ReachedError as reached:
            return reached.args[0]
        finally:
            assert list(tmp_path.iterdir()) == [], "nothing is written before all is checked"
        raise AssertionError

    return run


WRONG = [
    # a boolean is no number, text is none, a number is finite and whole where that is meant
    ("gpm", "seed", True, "must be a whole number"),
    ("gpm", "seed", 1.0, "must be a whole number"),
    ("gpm", "seed", "1", "must be a whole number"),
    ("gpm", "seed", -1, "must not be negative"),
    ("gpm", "batch_size", True, "must be a whole number"),
    ("gpm", "pack", True, "must be a whole number"),
    ("gpm", "num_workers", 0.5, "must be a whole number"),
    ("gpm", "deterministic", "off", "use true or false"),
    ("gpm", "run_dir", 5, "must be text or null"),
    ("gpm", "run_dir", "", "must not be empty"),
    ("gpm", "run_dir", ["a"], "must be text or null"),
    ("gpm", "widths", None, "must be a list of whole numbers"),
    ("gpm", "reference", {"acc": "hello"}, "must be a number or null"),
    ("gpm", "strategy.threshold", True, "must be a number, a list of numbers or {name: a number}"),
    ("gpm", "strategy.threshold", math.nan, "must be a finite number"),
    ("gpm", "strategy.threshold", [0.9], "has 1 entries, but 2 layers are protected"),
    ("gpm", "strategy.threshold", {"nothing*": 0.9}, "no pattern matches layer"),
    ("gpm", "strategy.samples", [10], "has 1 entries, but 2 layers are protected"),
    ("gpm", "strategy.samples", 1e9, "must be a whole number"),
    ("gpm", "strategy.increment", math.inf, "must be a finite number"),
    ("gpm", "strategy.protect", None, "leave it out, or set its options (include, exclude,"),
    ("gpm", "strategy.protect", "fc1", "its options stand below it|must be"),
    ("gpm", "strategy.protect.include", "fc1", "must be a list of text"),
    ("gpm", "strategy.protect.exclude", ["*"], "leaves no layer to protect"),
    ("adam_nscl", "strategy.protect.exclude", ["*"], "leaves no layer to protect"),
    ("rogo", "strategy.cosine", [0.9], "has 1 entries"),
    ("rogo", "strategy.official_quirks", "no", "use true or false"),
    ("rogo", "strategy.relax_below", math.nan, "must be a finite number"),
    ("sgp", "strategy.scale", math.inf, "must be a finite number"),
    ("trgp", "strategy.regions", 1.5, "must be a whole number"),
    ("ewc", "strategy.strength", math.nan, "must be a finite number"),
    ("ewc", "strategy.strength", "100", "must be a number"),
    ("er", "strategy.memory", 1.5, "must be a whole number"),
    ("freeze", "strategy.n_blocks", 1.5, "must be a whole number"),
    ("freeze", "strategy.embeddings", "no", "use true or false"),
    ("freeze", "strategy.start_task", 2, "has no effect, as stream 'permuted_digits' has 2 tasks"),
    ("task_vector", "strategy.start_task", 9, "has no effect"),
    ("adaptive_svd", "strategy.start_task", 9, "has no effect"),
    ("task_vector", "strategy.alpha", math.nan, "must be a finite number"),
    ("joint", "strategy.fresh", 0, "use true or false"),
    ("o_lora", "strategy.full_first", "n", "use true or false"),
    ("gpm", "stream.num_tasks", 2.5, "must be a whole number"),
    ("gpm", "stream.num_tasks", 101, "must lie in [1, 100]"),
    ("gpm", "stream.order_seed", 2**32, "must lie in [0, 4294967296)"),
    ("gpm", "stream.identity_first", "no", "use true or false"),
    ("gpm", "stream.task_id_at_test", "off", "must be true or false or null"),
    ("gpm", "stream.validation_fraction", math.nan, "must be a finite number"),
    ("gpm", "stream.validation_split", "middle", "use first or random"),
    ("gpm", "model.hidden", [1.5], "every entry: must be a whole number"),
    ("gpm", "model.hidden", 100, "must be a list of whole numbers"),
    ("gpm", "model.bias", "false", "use true or false"),
    ("gpm", "learner.head_bias", "maybe", "use true or false"),
    ("gpm", "optimizer.lr", "1e-3", "must be a number"),
    ("gpm", "optimizer.lr", True, "must be a number"),
    ("gpm", "optimizer.lr", math.nan, "must be a finite number"),
    ("gpm", "optimizer.lr", math.inf, "must be a finite number"),
    ("gpm", "optimizer.lr", None, "must be a number"),
    ("gpm", "optimizer.momentum", 2, "must lie in [0, 1)"),
    ("gpm", "optimizer.nesterov", "no", "use true or false"),
    ("gpm", "optimizer.weight_decay", math.inf, "must be a finite number"),
    ("gpm", "eval.dense", 3, "must be a list of whole numbers"),
    ("gpm", "eval.dense", [5], "add pack=1"),
    ("gpm", "eval.max_samples", True, "must be a whole number or null"),
    ("gpm", "eval.batch_size", 10.5, "must be a whole number"),
    ("gpm", "alignment.enabled", "no", "use true or false"),
    ("gpm", "alignment.samples", 2.5, "must be a whole number"),
    ("gpm", "probe.early", None, "must be a list of whole numbers"),
    ("gpm", "probe.updates", None, "probe.updates.enabled=false"),
    ("gpm", "probe.updates.enabled", 1, "use true or false"),
    ("gpm", "probe.general_text.enabled", True, "has no tokenizer"),
    ("gpm", "checkpoint.every_steps", 2.5, "must be a whole number or null"),
    ("gpm", "checkpoint.keep", True, "must be a whole number"),
    ("gpm", "checkpoint.enabled", 0, "use true or false"),
    ("gpm", "search.tasks", True, "must be a whole number"),
    ("gpm", "logger.project", 3, "must be text"),
    ("gpm", "logger.tags", "a", "must be a list of text"),
    ("gpm", "trainer.max_epochs", True, "must be a whole number"),
    ("gpm", "trainer.max_epochs", None, "say how many"),
    ("gpm", "trainer.devices", True, "whole numbers of at least 1"),
    ("gpm", "trainer.accumulate_grad_batches", 0, "at least 1"),
    ("gpm", "trainer.gradient_clip_val", -1, "must be above 0"),
    ("gpm", "trainer.limit_train_batches", 0, "must be above 0"),
    ("gpm", "trainer.limit_train_batches", 1.5, "a share in (0, 1], or a whole number"),
    ("gpm", "trainer.threads", 100_000, "at most 1024"),
    ("gpm", "alignment", False, "its options stand below it"),
    ("gpm", "optimizer._target_", "", "name a class or a function"),
    ("gpm", "optimizer.params", [1], "the run gives it; leave it out"),
    ("gpm", "model.input_shape", [3], "the run gives it; leave it out"),
    ("gpm", "also", {"er": {"memory": 3}}, "also.er has settings, but is not named: add +also=er"),
    ("gpm", "also", {"er": 3}, "also.er has settings, but is not named: add +also=er"),
    ("gpm", "reference", {"accuracy": 90}, "no such number is compared; there are strategy, acc"),
    ("task_vector", "strategy.epoch", 7, "task 'perm_0' has 1 epochs"),
    ("gpm", "trainer.limit_train_batches", 2, "not packs of 64 batches: add pack=1"),
    ("gpm", "trainer.max_steps", 3, "not packs of 64 batches: add pack=1"),
    ("gpm", "trainer.max_time", "00:00:00:01", "not packs of 64 batches: add pack=1"),
    ("gpm", "trainer.precision", "foo", "use 64, 32"),
    ("gpm", "trainer.fast_dev_run", True, "use trainer.limit_train_batches"),
    ("gpm", "trainer.limit_test_batches", 1, "eval.max_samples"),
    ("gpm", "trainer.min_epochs", 9, "leave it out"),
    ("gpm", "trainer.val_check_interval", 1, "has no effect here"),
    ("gpm", "trainer.profiler", "simple", "silent"),
    ("gpm", "eval", None, "eval is missing: a run needs it"),
    ("gpm", "probe", None, "probe is missing: a run needs it"),
    ("gpm", "schedule", None, "schedule is missing: a run needs it"),
    ("gpm", "unknown", 1, "there is no such setting, and no other refers to it"),
    ("gpm", "batchsize", 1, "Did you mean batch_size?"),
]


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [pytest.param(*row, id=f"{row[0]} {row[1]}={row[2]}") for row in WRONG if row[3]],
)
def test_a_wrong_setting_is_refused_in_one_line(begin, name, key, value, message):
    with pytest.raises(UsageError) as caught:
        begin(name, **{key: value})
    said = str(caught.value)
    assert key in said
    assert any(part in said for part in message.split("|")), said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("ewc", "strategy.fisher", True),
        ("gpm", "strategy.threshold", 1),
        ("gpm", "strategy.threshold", [0.9, 0.8]),
        ("gpm", "optimizer.lr", 0),
        ("gpm", "seed", 10**23),
        ("gpm", "trainer.precision", "64-true"),
        ("gpm", "trainer.detect_anomaly", True),
        ("gpm", "trainer.deterministic", "warn"),
        ("er", "strategy.replay", None),
    ],
)
def test_what_is_right_begins(begin, name, key, value):
    assert not [note for note in begin(name, **{key: value}) if "warning" in note]


FEDERATED = ("+federation=small", "federation.rounds=1")


@pytest.mark.parametrize(
    ("name", "stream", "more", "key", "value", "needed"),
    [
        ("ewc", "permuted_digits", (), "strategy.fisher_batch", 5, "strategy.fisher=batched"),
        ("freeze", "permuted_digits", (), "strategy.stop_samples", 5, "strategy.early_stop=..."),
        ("rogo", "permuted_digits", (), "strategy.relax_below", 0.1, "strategy.schedule=plateau"),
        (
            "adaptive_svd",
            "permuted_digits",
            (),
            "strategy.mrr",
            0.1,
            "strategy.schedule=importance",
        ),
        ("gpm", "permuted_digits", (), "probe.features.samples", 9, "probe.features.enabled=true"),
        ("gpm", "permuted_digits", (), "eval.dense_samples", 9, "eval.dense=..."),
        ("gpm", "permuted_digits", (), "search.tasks", 2, "search.enabled=true"),
        ("fot", "permuted_digits", FEDERATED, "federation.alpha", 9.0, "partition=dirichlet"),
        (
            "fot",
            "permuted_digits",
            FEDERATED,
            "federation.shards_per_client",
            7,
            "partition=shards",
        ),
        ("fot", "permuted_digits", FEDERATED, "strategy.omega", "secret", "sketch=gaussian or"),
        ("gpm", "permuted_digits", ("+also=ewc",), "also.ewc.fisher_batch", 5, "fisher=batched"),
    ],
)
def test_an_option_without_effect_is_refused(begin, name, stream, more, key, value, needed):
    with pytest.raises(UsageError, match=r"has no effect without .*" + re.escape(needed)) as caught:
        begin(name, stream, more, **{key: value})
    assert str(caught.value).startswith(f"{key}=")
    begin(name, stream, more, ["seed=0"], **{key: value})  # said by a file, as many do


def test_what_a_federation_does_not_do_is_warned_about(begin):
    (warning,) = begin("fot", "permuted_digits", FEDERATED, **{"trainer.max_epochs": 9})
    assert warning.startswith("warning: trainer.max_epochs=9 has no effect in a federation")
    (warning,) = begin("fot", "permuted_digits", FEDERATED, pack=4)
    assert warning.startswith("warning: pack=4 has no effect in a federation")
    with pytest.raises(UsageError, match=r"limit_train_batches=1: clients learn in a plain loop"):
        begin("fot", "permuted_digits", FEDERATED, **{"trainer.limit_train_batches": 1})


def test_settings_of_steps_are_warned_about_where_none_is_taken(begin):
    given = {"optimizer.lr": 3.0, "trainer.max_epochs": 9}
    said = begin("ncm", "split_digits", **given)
    for key in given:
        assert any(
            note.startswith(f"warning: {key}=") and "without a step" in note for note in said
        )
    assert not any("without a step" in note for note in begin("gpm", "split_digits", **given))


def test_a_memory_too_small_for_the_classes_is_refused_before_the_run(begin):
    with pytest.raises(UsageError, match=r"strategy.memory=1: stream 'split_digits' has 4 classes"):
        begin("icarl", "split_digits", ("stream.scenario=class",), **{"strategy.memory": 1})


@pytest.mark.parametrize("schedule", ["plateau", "steps"])
def test_a_schedule_that_changes_nothing_is_warned_about(begin, schedule):
    said = begin("gpm", "permuted_digits", (f"schedule={schedule}",))
    assert any("the schedule changes nothing" in note for note in said)
    longer = {"trainer.max_epochs": 80}
    said = begin("gpm", "permuted_digits", (f"schedule={schedule}",), **longer)
    assert not any("the schedule changes nothing" in note for note in said)


def test_a_plateau_needs_validation_data_before_anything_begins(begin):
    with pytest.raises(UsageError, match="has no validation samples"):
        begin("gpm", "permuted_digits", ("schedule=plateau",), **{"stream.validation_fraction": 0})


def test_keys_of_ones_own_are_fine_where_something_refers_to_them(begin):
    begin(**{"my_width": 8, "model.hidden": ["${my_width}"]})


def test_widths_that_nothing_takes_are_refused(begin):
    with pytest.raises(UsageError, match=r"widths=\[9\]: no part of this model takes them"):
        begin("gpm", "permuted_digits", ("model=cnn_small",), widths=[9])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("+strategy=null", "choose one of acil, "),
        ("schedule=null", "choose one of constant, "),
        ("logger=5", "choose one of csv, tensorboard, wandb"),
        ("seed=range(0)", "holds no value"),
        ("seed=range(0,3,0)", "no sweep (range() arg 3 must not be zero)"),
        ("stream.attributes={}", "merges nothing"),
        ("hydra.launcher.n_jobs=0", "at least 1, or -1 for all cores"),
    ],
)
def test_a_group_without_a_choice_and_a_sweep_without_a_value(word, message):
    with pytest.raises(UsageError, match=re.escape(f"{word}: ")) as caught:
        refuse_empty(["-m", word, "seed=0,1", "~schedule"], conf_directory())
    assert message in str(caught.value)
    refuse_empty(["-m", "+strategy=gpm,er", "seed=range(2)", "~schedule"], conf_directory())


def test_a_companion_is_named_once():
    assert "name each companion once" in str(refuse_lists(["+also=[er,er]"]))
    assert refuse_lists(["+also=[er,ewc]"]) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GPM(threshold=math.nan), r"strategy\.threshold=nan: must be a finite number"),
        (lambda: GPM(samples=True), r"strategy\.samples=true"),
        (lambda: ER(memory=-1), r"strategy\.memory=-1: at least 1; by default 500"),
        (lambda: EWC(fisher="no"), r"strategy\.fisher=no: use true, empirical or batched"),
        (lambda: Freeze(embeddings="no"), r"strategy\.embeddings=no: use true or false"),
        (lambda: TaskVector(start_task=-1), r"strategy\.start_task=-1: must not be negative"),
        (lambda: PermutedDigits(num_tasks=2.5), r"stream\.num_tasks=2\.5: must be a whole number"),
    ],
)
def test_objects_made_in_python_are_checked_as_well(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_double_precision_is_what_it_says(tmp_path):
    words = ("+strategy=gpm", "+stream=permuted_digits", *QUICK, "eval.max_samples=50")
    matrices = []
    for precision in ("64-true", "32-true"):
        cfg = copy.deepcopy(composed(*words))
        cfg.trainer.precision, cfg.trainer.accelerator = precision, "cpu"
        cfg.run_dir = str(tmp_path / precision)
        result = running.run_config(cfg, "", {"strategy": "gpm"})
        kinds = {p.dtype for p in result.learner.parameters()}
        assert kinds == {torch.float64 if precision == "64-true" else torch.float32}
        matrices.append(torch.from_numpy(result.matrix))
    torch.testing.assert_close(*matrices, rtol=0, atol=0.05)


def test_the_command_line_says_it_in_one_line(cli, tmp_path):
    status, _, error = cli("+strategy=gpm", "+stream=permuted_digits", "seed=true", "run_dir=here")
    assert (status, error) == (2, "error: seed=true: must be a whole number; by default 0\n")
    assert not (tmp_path / "here").exists()
    assert sys.argv[0] == "cl_bench"
