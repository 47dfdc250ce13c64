"""Every config says what its class says: keys, defaults, names, and the command that runs it."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from cl_bench import strategies
from cl_bench.cli.folders import conf_directory
from cl_bench.cli.listing import EXAMPLES, GROUPS, describe, options
from cl_bench.contracts import Strategy

CONF = conf_directory()
OBJECTS = {
    "input_shape", "vocabulary", "stream", "model", "optimizer", "batch_size", "seed", "pack",
    "params",
}  # fmt: skip
"""Arguments that the command line hands over itself."""


def paths(*groups):
    return [
        pytest.param(path, id=f"{group}/{name}")
        for group in groups
        for name, path in sorted(options([CONF], group).items())
    ]


def comments(path):
    lines = path.read_text().splitlines()
    return [line for line in lines if line.startswith("#") and "@package" not in line]


def plain(value):
    """Tuples as yaml has them, settings objects as their fields."""
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if hasattr(value, "__dataclass_fields__"):
        return {k: plain(getattr(value, k)) for k in value.__dataclass_fields__}
    return value


def defaults_of(target):
    parameters = inspect.signature(target).parameters.values()
    own = issubclass(target, Strategy) if isinstance(target, type) else False
    handed = OBJECTS - {"seed"} if own else OBJECTS
    return {p.name: plain(p.default) for p in parameters if p.name not in handed}


def same(config, defaults, where):
    """Nested settings objects may default to None, which means their own defaults."""
    config = {k: v for k, v in config.items() if k != "_target_"}
    assert set(config) == set(defaults), where
    for key, value in config.items():
        if isinstance(value, dict) and "_target_" in value:
            inner = get_object(value["_target_"])
            same(value, defaults[key] or defaults_of(inner), f"{where}.{key}")
        else:
            assert value == defaults[key], f"{where}.{key}"


@pytest.mark.parametrize("path", paths("strategy", "model", "also", "probe"))
def test_keys_and_defaults_are_the_constructors(path):
    config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    preset = config.pop("defaults", [])
    if {"/protect@protect": "layers"} in preset:
        config["protect"] = OmegaConf.to_container(OmegaConf.load(CONF / "protect/layers.yaml"))
    elif preset:  # other values of a strategy's own keys
        base = OmegaConf.to_container(OmegaConf.load(path.with_name(f"{preset[0]}.yaml")))
        assert path.stem.startswith(f"{preset[0]}_")
        assert set(config) <= {*base, "protect"}
        return
    target = get_object(config["_target_"])
    defaults = defaults_of(target)
    sizes = ("gpt", "pythia", "t5_", "llama", "text_tiny")
    if path.stem.startswith(sizes) or path.stem == "resnet18_small_84":
        # Sizes of one architecture, or names on the hub.
        assert set(config) - {"_target_"} <= set(defaults)
        return
    same(config, defaults, path.stem)


@pytest.mark.parametrize("path", paths("optimizer", "learner"))
def test_keys_are_arguments(path):
    config = OmegaConf.to_container(OmegaConf.load(path))
    accepted = inspect.signature(get_object(config["_target_"])).parameters
    assert set(config) - {"_target_", "_partial_", "at_task"} <= set(accepted)


@pytest.mark.parametrize("path", paths("strategy"))
def test_strategy_class_config_and_file_have_one_name(path):
    config = OmegaConf.load(path)
    if "_" in path.stem and "fot" in config.get("defaults", ()):  # a preset: no class of its own
        base = OmegaConf.load(path.with_name(f"{config.defaults[0]}.yaml"))
        assert config._target_ == base._target_
        return
    module, name = config._target_.rsplit(".", 1)
    assert re.fullmatch(rf"cl_bench\.strategies\.[a-z]+\.{path.stem}", module)
    assert getattr(strategies, name) is get_object(config._target_)
    assert name.lower() == path.stem.replace("_", "")
    assert get_object(f"{module}.{name}").__module__ == module
    assert importlib.import_module(module).__doc__


@pytest.mark.parametrize("path", paths("also"))
def test_a_companion_is_the_strategy_of_its_name(path):
    first, *rest = path.read_text().splitlines()
    assert first == f"# @package also.{path.stem}", "Hydra reads the package from the first line"
    strategy = CONF / "strategy" / path.name
    assert OmegaConf.load(path) == OmegaConf.load(strategy)
    assert rest[1:] == strategy.read_text().splitlines()[1:], "comments too"


@pytest.mark.parametrize("path", paths(*GROUPS, "optimizer", "learner", "trainer", "logger"))
def test_the_first_comment_is_a_command_and_the_second_a_description(path):
    command, description, *_ = comments(path)
    assert "python -m cl_bench " in command
    group = path.relative_to(CONF).parts[0]
    name = path.relative_to(CONF / group).with_suffix("").as_posix()
    if group in ("strategy", "stream", "experiment", "also", "search", "cluster"):
        assert f"+{group}={name}" in command
    assert describe(path) == description.lstrip("# ")
    assert len(description) > 4


def test_every_file_belongs_to_a_group_or_to_the_config_beside_it():
    known = {CONF / "config.yaml"}
    parts = {CONF / "protect/layers.yaml", *CONF.rglob("_*.yaml")}
    for group in (*GROUPS, "adapter", "board", "optimizer", "learner", "trainer", "logger"):
        known |= set(options([CONF], group).values())
    rest = {p for p in CONF.rglob("*.yaml") if p not in known | parts}
    assert all((p.parent.parent / f"{p.parent.name}.yaml").is_file() for p in rest), rest


def test_examples_name_what_there_is():
    for example in EXAMPLES:
        for word in example.split():
            group, _, names = word.lstrip("+").partition("=")
            if word.startswith("+"):
                assert set(names.split(",")) <= set(options([CONF], group)), word


def test_options_hide_the_parts_of_an_experiment(tmp_path: Path):
    for name in ("a.yaml", "a/gpm.yaml", "b/c.yaml"):
        (tmp_path / "experiment" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "experiment" / name).touch()
    assert sorted(options([tmp_path], "experiment")) == ["a", "b/c"]
