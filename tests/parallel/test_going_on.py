"""Processes that share weights out die at any moment; they, or another number, go on."""

import pytest
import torch
from several import assert_equal_runs, start_together
from together import INTERRUPTED, MOMENTS, run

from runs import differences, final_weights


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    return directory, start_together(directory, "interrupted")


@pytest.fixture(scope="module")
def four_then_two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("four")
    start_together(directory, "interrupted", 4)
    return start_together(directory, "go_on", 2)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", INTERRUPTED)
def test_a_run_that_dies_goes_on_to_the_same_bits(two, name, moment):
    directory, found = two
    for mine, whole in zip(found(f"{name}-{moment}"), found(f"{name}-whole"), strict=True):
        for key, weight in whole["weights"].items():
            assert torch.equal(mine["weights"][key], weight), key
        assert torch.equal(mine["matrix"], whole["matrix"])
    whole, mine = directory / f"{name}-whole", directory / f"{name}-{moment}"
    assert differences(whole, mine) == []
    assert final_weights(whole) == final_weights(mine)


@pytest.mark.slow
@pytest.mark.parametrize("name", INTERRUPTED)
def test_a_run_that_four_began_goes_on_in_two(four_then_two, tmp_path, name):
    assert_equal_runs(four_then_two(f"{name}-waiting"), run(name, tmp_path / "alone"))
