"""Two and four processes that share out a language model come to what one process does."""

import pytest
from several import assert_equal_runs, start_together
from together import LANGUAGE, run


@pytest.fixture(scope="module", params=[2, 4])
def several(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(f"language{request.param}")
    return start_together(directory, "language", request.param)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    known = {}

    def learned(name):
        if name not in known:
            known[name] = run(name, tmp_path_factory.mktemp("alone") / name)
        return known[name]

    return learned


@pytest.mark.slow
@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models_that_processes_share_out_are_those_of_one(several, alone, name):
    found, wanted = several(f"{name}-fsdp"), alone(name)
    assert_equal_runs(found, wanted)
    assert max(one["held"] for one in found) < 0.8 * wanted["held"]
    assert wanted["bases"] or not name.startswith(("gpm", "rogo"))
