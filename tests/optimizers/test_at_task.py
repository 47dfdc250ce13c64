"""What an optimizer knows when a task begins, and what is refused before one does."""

import functools

import pytest
import torch
from dying import die, learn, names, same
from torch import nn
from torch.optim import SGD, Adafactor, Adam, Muon
from toys import cnn, learn_stream, make_learner, make_stream, mlp
from toys import learn as learn_task

from cl_bench.contracts import UsageError
from cl_bench.experiment.snapshot import RunState
from cl_bench.optimizers import ByRole, check_at_task, check_optimizer, split_by_role
from cl_bench.optimizers.dion import Dion
from cl_bench.optimizers.lmo import LMO
from cl_bench.strategies.baselines.finetune import Finetune
from cl_bench.strategies.projection.gpm import GPM

pytestmark = pytest.mark.usefixtures("no_pictures")

adam = functools.partial(Adam, lr=1e-2)
by_role = functools.partial(ByRole, rule=functools.partial(LMO, norm="row"), others=adam, lr=0.05)


def second_task(at_task, optimizer=adam):
    """The optimizer's state at the end of a task, and at the beginning of the next."""
    stream = make_stream(tasks=2)
    learner = make_learner(stream, optimizer=optimizer)
    learner.at_task = at_task
    ended = learn_task(learner, Finetune(), stream[0], epochs=1)
    learner._hand_on([ended])
    learner.begin(stream[1], Finetune())
    begun = learner.configure_optimizers()
    named = dict(learner.named_parameters())
    return [
        {
            n: {k: torch.as_tensor(v).clone() for k, v in o.state[p].items()}
            for n, p in named.items()
        }
        for o in (ended, begun)
    ]


def test_by_default_a_task_begins_with_nothing():
    _, begun = second_task("reset")
    assert not any(begun.values())


@pytest.mark.parametrize("optimizer", [adam, by_role])
def test_kept_state_is_that_of_the_last_task(optimizer):
    ended, begun = second_task("keep", optimizer)
    assert any(ended.values())
    for name, state in ended.items():
        assert state.keys() == begun[name].keys()
        assert all(torch.equal(state[k], begun[name][k]) for k in state)


def test_kept_second_moments_leave_means_of_gradients_behind():
    ended, begun = second_task("keep_second_moments")
    for name, state in ended.items():
        assert torch.equal(state["exp_avg_sq"], begun[name]["exp_avg_sq"])
        assert state["exp_avg"].any()
        assert not begun[name]["exp_avg"].any()
        assert begun[name]["step"] == state["step"] > 0


def test_a_kept_state_projects_steps_and_keeps_old_inputs_answers():
    """Momentum of before would lead projected gradients out of their subspace."""
    stream = make_stream(tasks=2)
    learner = make_learner(stream, optimizer=functools.partial(SGD, lr=0.05, momentum=0.9))
    assert learner.projectable != "step"
    learner.at_task = "keep"
    gpm = GPM(threshold=1.0, samples=40)
    learn_task(learner, gpm, stream[0], epochs=2)
    before = {n: p.detach().clone() for n, p in learner.named_parameters()}
    learn_task(learner, gpm, stream[1], epochs=2)
    assert gpm.projected_at == "step"
    layer, M = "backbone.fc1", gpm.memory["backbone.fc1"][:, :5].float()
    moved = dict(learner.named_parameters())[f"{layer}.weight"].detach() - before[f"{layer}.weight"]
    assert (moved @ M).norm() < 2e-5 * moved.norm()


@pytest.mark.parametrize("at_task", ["keep", "keep_second_moments"])
def test_a_killed_run_goes_on_with_what_was_kept(tmp_path, at_task):
    options = {"optimizer": adam, "at_task": at_task, "epochs": 2}
    learn(tmp_path / "whole", **options)
    die(tmp_path / "part", dies_at=17, **options)
    learn(tmp_path / "part", resume=True, **options)
    same(tmp_path / "whole", tmp_path / "part")


def test_what_cannot_be_restored_inside_a_task_is_saved_between_tasks_alone(tmp_path):
    options = {"optimizer": adam, "resumes_inside": False, "epochs": 2}
    learn(tmp_path / "whole", **options)
    die(tmp_path / "part", dies_at=17, **options)
    assert names(tmp_path / "part") == [f"task{t:04}-step{0:09}.pt" for t in (0, 1)]
    learn(tmp_path / "part", resume=True, **options)
    same(tmp_path / "whole", tmp_path / "part")
    assert RunState(make_learner(make_stream()), Finetune(), None, None, None).every_steps


def test_every_parameter_is_in_one_group_and_heads_are_no_matrices():
    stream = make_stream("task", shape=(2, 6, 6), subspace=None)
    learner = make_learner(stream, model=cnn())
    own = [nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.zeros(3))]
    named = dict(learner.named_parameters())
    groups = split_by_role([{"params": [*named.values(), *own], "lr": 0.5}], named, learner.roles())
    parts = {group["role"]: group["params"] for group in groups}
    assert sum(map(len, parts.values())) == len(named) + 2
    assert {id(p) for ps in parts.values() for p in ps} == {id(p) for p in [*named.values(), *own]}
    assert all(group["lr"] == 0.5 for group in groups)
    heads = {id(p) for n, p in named.items() if n.startswith("heads")}
    assert {id(p) for p in parts["head"]} == heads
    assert any(p is own[0] for p in parts["matrix"])
    assert any(p is own[1] for p in parts["vector"])


def test_a_rule_for_matrices_learns_a_stream():
    stream = make_stream(tasks=2)
    learner = make_learner(stream, mlp(bias=True), by_role)
    learn_stream(learner, GPM(threshold=0.9, samples=40), stream, epochs=2)
    assert learner.projectable == "step"


# --- what is refused ------------------------------------------------------------------------------


def made(rule, role="matrix"):
    matrix, vector = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    groups = [{"params": [matrix], "role": role}, {"params": [vector], "role": "vector"}]
    return ByRole(groups, rule, adam, 0.1)


def checked(optimizer, network=None, processes=1, shared=False, precision="32-true"):
    learner = make_learner(make_stream(), network)
    named = dict(learner.named_parameters())
    check_optimizer(optimizer, named, learner.roles(), processes, shared, precision)


def test_what_a_rule_takes_is_not_refused():
    checked(made(Muon))
    checked(made(Dion))
    checked(made(LMO), processes=2)
    checked(Adam([nn.Parameter()], fused=True))


def test_kernels_shared_weights_random_numbers_and_fused_steps_are_refused():
    image = make_learner(make_stream(shape=(2, 6, 6), subspace=None), model=cnn())
    named = dict(image.named_parameters())
    with pytest.raises(UsageError, match=r"Muon takes matrices.*\(4, 2, 3, 3\)"):
        check_optimizer(made(Muon), named, image.roles(), 1, False, "32-true")
    check_optimizer(made(LMO), named, image.roles(), 1, False, "32-true")
    with pytest.raises(UsageError, match="LMO needs whole weights"):
        checked(made(LMO), processes=2, shared=True)
    with pytest.raises(UsageError, match="Adafactor needs whole weights"):
        checked(Adafactor([nn.Parameter(torch.zeros(2, 2))]), processes=2, shared=True)
    with pytest.raises(UsageError, match="Dion draws random numbers"):
        checked(made(Dion), processes=2)
    with pytest.raises(UsageError, match="fused=true"):
        checked(Adam([nn.Parameter()], fused=True), precision="16-mixed")


def test_a_state_that_cannot_be_carried_is_not_promised():
    check_at_task(made(LMO), "keep_second_moments", False, False)
    with pytest.raises(UsageError, match="SGD keeps no second moments"):
        check_at_task(SGD([nn.Parameter()]), "keep_second_moments", False, False)
    with pytest.raises(UsageError, match="federation"):
        check_at_task(Adam([nn.Parameter()]), "keep", True, False)
    with pytest.raises(UsageError, match="fsdp"):
        check_at_task(Adam([nn.Parameter()]), "keep", False, True)
