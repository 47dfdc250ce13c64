"""The table of docs/adapters.md says what conf/adapter and the layers say."""

from pathlib import Path

import pytest
import torch
from nets import CONF, NAMES, adapter, settings
from torch import nn

from cl_bench.adapters.trial import START, tried
from cl_bench.contracts import UsageError
from cl_bench.subspace import linear_maps

pytest.importorskip("peft")
pytest.importorskip("transformers")

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"


def fits(name, layer):
    """Whether the adapter takes such a layer and starts at what it computes."""
    try:
        count, change = tried(linear_maps("layer", layer), adapter(name).config)
    except UsageError:
        return False
    assert count > 0
    return change <= START


def row(name):
    """Of the table."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    takes = {"`Conv2d`": nn.Conv2d(16, 32, 3), "GPT-2's `Conv1D`": Conv1D(48, 64)}
    assert fits(name, nn.Linear(64, 48)), name
    also = ", ".join(kind for kind, layer in takes.items() if fits(name, layer))
    described = (CONF / f"{name}.yaml").read_text().splitlines()[1].removeprefix("# ")
    cfg = settings(name)
    whose = "PEFT" if cfg.config._target_.startswith("peft.") else "ours"
    size = f"`{cfg.size}`" if cfg.size else "one size"
    return f"| `{name}` | {described} | {whose} | {size} | {also} |"


@pytest.mark.parametrize("name", NAMES)
def test_every_adapter_has_its_row(name):
    assert row(name) in PAGE.read_text().splitlines()


def test_no_row_is_of_another():
    rows = [
        line
        for line in PAGE.read_text().partition("## Measured")[0].splitlines()
        if line.startswith("| `") and "`adapter." not in line
    ]
    assert [line.split("`")[1] for line in rows] == NAMES
