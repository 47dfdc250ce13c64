"""Every yaml of ``conf/strategy`` keeps the laws of the house, and what breaks one is caught."""

import functools
import sys
import time
from collections import defaultdict

import laws
import pytest
import torch
from cases import NAMES, RefusedError, Setting, make_strategy

from cl_bench.federation import FederatedEngine

BUDGET_SECONDS = 4
"""Of computing, for all laws of one strategy."""

every = pytest.mark.parametrize("name", NAMES)
seconds = defaultdict(float)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks of this size wait for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """No pictures and no tables."""
    module = sys.modules["cl_bench.experiment.conduct"]
    monkeypatch.setattr(module, "write_figures", lambda directory: [])
    monkeypatch.setattr(module, "write_probe_figures", lambda directory: [])
    monkeypatch.setattr(module, "print_run", lambda directory, console: None)


@pytest.fixture(autouse=True)
def timed(request, plain):
    """What a strategy's laws take is added up."""
    began = time.process_time()
    yield
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    seconds[name] += time.process_time() - began


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process comes to, by case."""
    return functools.cache(
        lambda name: laws.whole_run(name, tmp_path_factory.mktemp("alone") / name)
    )


def lawful(name, law, *arguments):
    """Keep the law, or be refused: of ours, engines without a Trainer refuse what needs one."""
    try:
        law(name, *arguments)
    except RefusedError as refusal:
        if "local" in make_strategy(name).needs.engines:
            pytest.fail(f"refused: {refusal}")


@every
def test_what_is_saved_is_all_that_the_next_task_needs(name):
    laws.state_round_trip(name)


@every
def test_killed_inside_a_task_and_resumed_it_is_the_same_run(name, tmp_path, monkeypatch):
    monkeypatch.setattr(FederatedEngine, "figures", lambda self, directory: [])
    laws.kill_and_resume(name, tmp_path)


@every
def test_two_processes_come_to_what_one_does(name, alone, pair):
    lawful(name, lambda n: laws.two_processes(n, alone(n), pair))
    seconds[name] += pair.seconds[name]


@every
def test_half_batches_accumulated_are_whole_ones(name, alone, tmp_path):
    lawful(name, lambda n: laws.accumulation(n, alone(n), tmp_path / "run"))


@every
def test_in_half_precision_weights_stay_whole_and_finite(name, tmp_path):
    lawful(name, laws.half_precision, tmp_path / "run")


@every
def test_release_leaves_no_trace(name):
    laws.no_trace(name)


@every
def test_batches_in_packs_are_the_same_steps(name, alone, tmp_path):
    lawful(name, lambda n: laws.packed(n, alone(n), tmp_path / "run"))


@pytest.mark.parametrize("name", ["ncm", "ranpac"])
def test_two_processes_sum_what_one_does(name, alone, pair):
    """What heads in closed form keep, to rounding."""
    found = dict(laws.flat_tensors("", pair(name)[0].state))
    wanted = dict(laws.flat_tensors("", alone(name).state))
    assert found.keys() == wanted.keys()
    assert {"/sums", "/counts"} <= found.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=1e-10, rtol=1e-10)


# -- negative controls: each law is broken by something --------------------------------------------


def breaks(match, law, name, *arguments):
    """The law finds it out, by what it says, and not because a run ends otherwise."""
    with pytest.raises(AssertionError, match=match):
        law(name, *arguments)


def test_a_memory_that_is_not_saved_is_found():
    breaks("the next task differs", laws.state_round_trip, "Forgetful")


def test_a_count_that_is_not_saved_is_found(tmp_path):
    breaks("weights/task0002", laws.kill_and_resume, "ForgetfulInside", tmp_path)


def test_a_rule_that_sees_one_processs_samples_is_found(alone, pair):
    breaks("weights differ|disagree", laws.two_processes, "Selfish", alone("Selfish"), pair)


def test_a_rule_that_counts_batches_is_found(alone, tmp_path):
    breaks(
        "weights differ",
        laws.accumulation,
        "CountsBatches",
        alone("CountsBatches"),
        tmp_path / "run",
    )


@pytest.mark.parametrize(
    ("broken", "match"), [("Halving", "is torch.bfloat16"), ("Exploding", "/memory")]
)
def test_what_does_not_end_whole_and_finite_is_found(broken, match, tmp_path):
    breaks(match, laws.half_precision, broken, tmp_path / "run")


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        ("LeavesHook", "'backbone': .*_forward_hooks"),
        ("LeavesClosure", "'forward': functools.partial"),
        ("LeavesClass", "Attached"),
        ("LeavesParameter", "'more'"),
        ("LeavesFrozen", "learns or is in training mode"),
    ],
)
def test_what_stays_on_the_network_is_found(broken, match):
    breaks(match, laws.no_trace, broken)


def test_a_pass_that_nobody_tells_of_is_found():
    breaks("2 passes, and it says 1", laws.no_trace, "AsksTwice")


def test_a_copy_that_computes_with_old_weights_is_found():
    """The last part of the law, for a closure that nobody sees in the modules."""
    setting = Setting("finetune")
    layer = setting.learner.heads[0]
    weight = layer.weight
    layer.__class__ = type(
        "Closed",
        (type(layer),),
        {"forward": lambda self, x: torch.nn.functional.linear(x, weight)},
    )
    fresh = Setting("finetune").learner
    with pytest.raises(AssertionError, match="the copy computes with other weights"):
        laws.copies_stand_alone(setting.learner, fresh, setting.stream[0])


def test_a_rule_that_packs_leave_out_is_found(alone, tmp_path):
    breaks("weights differ", laws.packed, "OnlyUnpacked", alone("OnlyUnpacked"), tmp_path / "run")


def test_a_refusal_is_found(tmp_path):
    with pytest.raises(pytest.fail.Exception, match=r"refused: strategy\.x=1"):
        lawful("Refusing", laws.packed, None, tmp_path / "run")


def test_the_laws_are_within_their_budget(capsys):
    """Generous: machines differ. The times are printed with ``-s``."""
    spent = {name: value for name, value in seconds.items() if name in NAMES}
    for name, value in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"{name:16} {value:5.2f} s")
    assert all(value < 4 * BUDGET_SECONDS for value in spent.values()), spent
