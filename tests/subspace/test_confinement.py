"""Updates confined to what a subspace leaves free, wherever they are projected."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from spaces import case_, orthonormal, projector, randn  # noqa: F401
from torch import nn

from cl_bench.subspace import (
    Confinement,
    LinearMap,
    Projection,
    ahead,
    confinement,
    linear_maps,
    mark_drawn,
    unconfined,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


# -- Confinement -----------------------------------------------------------------------------------


def bases_for(layers, share):
    return {x.name: orthonormal(x.in_features, round(share * x.in_features)) for x in layers}


def confine(layers, bases, where):
    projections = {name: Projection(basis) for name, basis in bases.items()}
    return Confinement(layers, projections, where, dict.fromkeys(bases, 1.0))


def sgd_step(module, confined, x, lr=0.1):
    """(weight, bias) changes of one step of plain SGD, and the gradient of the input."""
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    optimizer.zero_grad()
    x = x.clone().requires_grad_()
    out = module(x)
    (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
    confined.constrain()
    optimizer.step()
    confined.after_step()
    return [p.detach() - b for p, b in zip(module.parameters(), before, strict=True)], x.grad


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("where", ["gradient", "input", "step"])
@pytest.mark.usefixtures("always_inputs")
def test_all_places_give_the_dense_update(case, augment, share, where):
    module, x = case
    layers = linear_maps("l", module, augment)
    bases = bases_for(layers, share)
    raw, raw_input = sgd_step(copy.deepcopy(module), confine([], {}, "gradient"), x)
    confined = confine(layers, bases, where)
    found, found_input = sgd_step(module, confined, x)
    confined.release()
    torch.testing.assert_close(found_input, raw_input)
    expected = [change.clone() for change in raw]
    bias = None if layers[0].bias is None else 1
    for layer in layers:
        parts = raw[0], None if bias is None else raw[1]
        dense = layer.matrix(*parts).double()
        dense = dense - dense @ projector(bases[layer.name])
        layer.store(dense.float(), expected[0], None if bias is None else expected[1])
    for change, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(change, wanted, atol=1e-5, rtol=1e-5)
    if share == 1.0:  # SGD's own rounding of w - lr * g aside
        guarded = torch.cat([layer.matrix(*found, *[None] * (bias is None)) for layer in layers])
        assert float(guarded.abs().max()) < 1e-6


@pytest.mark.parametrize("where", ["gradient", "input", "step"])
@pytest.mark.usefixtures("always_inputs")
def test_rank_0_is_plain_sgd_bit_for_bit(case, where):
    module, x = case
    layers = linear_maps("l", module)
    raw, _ = sgd_step(copy.deepcopy(module), confine([], {}, "gradient"), x)
    found, _ = sgd_step(module, confine(layers, bases_for(layers, 0.0), where), x)
    assert all(torch.equal(a, b) for a, b in zip(raw, found, strict=True))


@pytest.mark.parametrize("where", ["gradient", "input", "step"])
@pytest.mark.usefixtures("always_inputs")
def test_full_rank_does_not_move_at_all(where):
    module, x = nn.Linear(5, 4), torch.randn(7, 5)
    layers = linear_maps("l", module, augment=True)
    before = copy.deepcopy(module.state_dict())
    confined = confine(layers, bases_for(layers, 1.0), where)
    for _ in range(3):
        sgd_step(module, confined, x)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


@pytest.mark.parametrize("where", ["gradient", "input", "step"])
@pytest.mark.usefixtures("always_inputs")
def test_outputs_in_the_subspace_stay_and_others_move(where):
    module = nn.Linear(8, 4)
    layers = linear_maps("l", module, augment=True)
    old = F.pad(torch.randn(3, 8), (0, 1), value=1.0).double()
    basis = torch.linalg.qr(old.t())[0]
    inside, outside = old[:, :-1].float(), torch.randn(5, 8)
    before = module(inside).detach(), module(outside).detach()
    confined = confine(layers, {"l": basis}, where)
    for i in range(5):
        sgd_step(module, confined, torch.randn(6, 8) + i)
    torch.testing.assert_close(module(inside), before[0], atol=1e-5, rtol=1e-5)
    moved = module(outside).detach() - before[1]
    assert float(moved.norm()) > 0.1 * float(before[1].norm())


LEAKING = {
    "Adam": functools.partial(torch.optim.Adam, lr=0.01),
    "AdamW": functools.partial(torch.optim.AdamW, lr=0.01),
    "decay": functools.partial(torch.optim.SGD, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", LEAKING)
@pytest.mark.parametrize("where", ["gradient", "step"])
def test_only_the_projected_step_holds_for_any_optimizer(optimizer, where):
    module = nn.Linear(12, 6, bias=False)
    layers = linear_maps("l", module)
    basis = orthonormal(12, 5)
    confined = confine(layers, {"l": basis}, where)
    before = module.weight.detach().clone()
    updating = LEAKING[optimizer](module.parameters())
    for i in range(20):
        updating.zero_grad()
        (module(randn(i, 7, 12, dtype=torch.float32)).square().mean()).backward()
        confined.constrain()
        updating.step()
        confined.after_step()
    change = (module.weight.detach() - before).double()
    leak = float((change @ basis).norm() / change.norm())
    assert float(change.norm()) > 0
    assert leak < 1e-5 if where == "step" else leak > 1e-2


def test_layers_without_gradient_are_left_alone():
    module = nn.Linear(5, 4)
    module.requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    for where in ("gradient", "step"):
        confined = confine(linear_maps("l", module, True), {"l": orthonormal(6, 3)}, where)
        confined.constrain()
        confined.after_step()
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_inputs_are_projected_only_where_that_saves_work():
    wide, narrow = nn.Linear(2000, 1000, bias=False), nn.Linear(8, 4, bias=False)
    layers = [LinearMap("wide", wide), LinearMap("narrow", narrow)]
    bases = {"wide": torch.eye(2000)[:, :100], "narrow": torch.eye(8)[:, :2]}
    projections = {name: Projection(basis) for name, basis in bases.items()}
    few = Confinement(layers, projections, "input", {"wide": 10, "narrow": 1})
    assert type(wide) is not nn.Linear
    assert type(narrow) is nn.Linear
    few.release()
    assert type(wide) is nn.Linear
    Confinement(layers, projections, "input", {"wide": 1000, "narrow": 1000})
    assert type(wide) is nn.Linear


@pytest.mark.parametrize("where", ["gradient", "input", "step"])
@pytest.mark.usefixtures("always_inputs")
def test_one_layer_is_confined_otherwise_and_the_rest_keeps_what_it_prepared(where):
    modules = {"a": nn.Linear(6, 4, bias=False), "b": nn.Linear(6, 4, bias=False)}
    bases = {name: orthonormal(6, 2) for name in modules}
    confined = confine([LinearMap(*pair) for pair in modules.items()], bases, where)
    prepared = {name: getattr(module, "ahead", None) for name, module in modules.items()}
    bases["b"] = orthonormal(6, 4)
    confined.replace({"b": Projection(bases["b"])})
    assert getattr(modules["a"], "ahead", None) is prepared["a"]
    for name, module in modules.items():
        (change,), _ = sgd_step(module, confined, torch.randn(5, 6))
        assert change.norm() > 1e-3
        assert (change @ bases[name].float()).norm() < 1e-5 * change.norm()
    confined.replace({"a": Projection(bases["a"][:, :0]), "b": Projection(bases["b"][:, :0])})
    assert all(type(module) is nn.Linear for module in modules.values())
    (change,), _ = sgd_step(modules["a"], confined, torch.randn(5, 6))
    assert (change @ bases["a"].float()).norm() > 1e-2 * change.norm()
    confined.release()


# -- layers whose gradient is born projected -------------------------------------------------------


@pytest.fixture
def confined_linear(always_inputs):
    linear = nn.Linear(6, 4, bias=False)
    basis = orthonormal(6, 3)
    return linear, basis, confine([LinearMap("l", linear)], {"l": basis}, "input")


def weight_gradient(linear, x):
    linear.weight.grad = None
    linear(x).square().sum().backward()
    return linear.weight.grad.clone()


def raw_gradient(weight, x):
    return 2 * weight.detach() @ x.t() @ x


def assert_projected(gradient, weight, x, basis):
    raw = raw_gradient(weight, x).double()
    expected = (raw - raw @ projector(basis)).float()
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


def test_a_copy_uses_its_own_weights(confined_linear):
    linear, basis, _ = confined_linear
    x = torch.randn(20, 6)
    weight_gradient(linear, x[:5])
    twin = copy.deepcopy(linear)
    with torch.no_grad():
        twin.weight.mul_(3.0)
    for copied in (linear, twin):
        for piece in (x[:5], torch.randn(4, 6)):
            torch.testing.assert_close(copied(piece), piece @ copied.weight.t())
            assert_projected(weight_gradient(copied, piece), copied.weight, piece, basis)


def test_unconfined_yields_raw_gradients(confined_linear):
    linear, basis, _ = confined_linear
    x = torch.randn(5, 6)
    with unconfined():
        torch.testing.assert_close(weight_gradient(linear, x), raw_gradient(linear.weight, x))
        with unconfined():
            pass
        torch.testing.assert_close(weight_gradient(linear, x), raw_gradient(linear.weight, x))
    assert_projected(weight_gradient(linear, x), linear.weight, x, basis)


def test_release_restores_the_plain_layer(confined_linear):
    linear, _, confined = confined_linear
    x = torch.randn(5, 6)
    keys = set(nn.Linear(6, 4, bias=False).__dict__)
    assert list(linear.state_dict()) == ["weight"]
    assert isinstance(linear, nn.Linear)
    confined.release()
    assert type(linear) is nn.Linear
    assert set(linear.__dict__) == keys
    torch.testing.assert_close(weight_gradient(linear, x), raw_gradient(linear.weight, x))
    confined.constrain()
    confined.release()


@pytest.mark.usefixtures("always_inputs")
def test_a_second_derivative_is_refused():
    linear = nn.Linear(6, 4)
    confine(linear_maps("l", linear), {"l": orthonormal(6, 3)}, "input")
    x = torch.randn(5, 6, requires_grad=True)
    (g,) = torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()


@pytest.mark.parametrize("drawn", [False, True])
def test_slices_of_a_fetched_tensor_learn_the_same(confined_linear, drawn):
    linear, basis, _ = confined_linear
    data, index = torch.randn(30, 6), torch.randperm(30)[:20]
    plain = copy.deepcopy(linear)
    for _ in range(2):
        fetched = data[index]
        if drawn:
            mark_drawn(fetched, data, index)
        for piece in fetched.reshape(4, 5, 6):
            known = linear.ahead.of(piece, linear.weight)
            assert known is not None
            projected = piece.double() - piece.double() @ projector(basis)
            torch.testing.assert_close(known[0], projected.float(), atol=1e-5, rtol=1e-5)
            out, expected = linear(piece), plain(piece.clone())
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
            found = weight_gradient(linear, piece)
            torch.testing.assert_close(
                found, weight_gradient(plain, piece.clone()), atol=1e-4, rtol=1e-4
            )
            with torch.no_grad():
                linear.weight.sub_(0.01 * found)
                plain.weight.sub_(0.01 * plain.weight.grad)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("when", ["before the first step", "between steps"])
def test_a_batch_changed_in_place_is_noticed(confined_linear, drawn, when):
    linear, basis, _ = confined_linear
    data, index = torch.randn(30, 6), torch.arange(20)
    fetched = data[index]
    if drawn:
        mark_drawn(fetched, data, index)
    batches = fetched.reshape(4, 5, 6)
    if when == "between steps":
        weight_gradient(linear, batches[0])
    fetched.mul_(-2.0).add_(1.0)
    torch.testing.assert_close(linear(batches[1]), batches[1] @ linear.weight.t())
    assert_projected(weight_gradient(linear, batches[1]), linear.weight, batches[1], basis)


def test_a_task_resumed_between_steps_goes_on_bit_for_bit(confined_linear):
    linear, basis, confined = confined_linear
    data = torch.randn(30, 6)

    def steps(layer):
        for index in torch.arange(30).reshape(2, 15):
            fetched = data[index]
            mark_drawn(fetched, data, index)
            for piece in fetched.reshape(3, 5, 6):
                gradient = weight_gradient(layer, piece)
                with torch.no_grad():
                    layer.weight.sub_(0.01 * gradient)

    steps(linear)
    state, weight = confined.state_dict(), linear.weight.detach().clone()
    steps(linear)
    resumed = nn.Linear(6, 4, bias=False)
    resumed.weight.data.copy_(weight)
    again = confine([LinearMap("l", resumed)], {"l": basis}, "input")
    again.load_state_dict(state)
    steps(resumed)
    assert torch.equal(resumed.weight, linear.weight)


def test_what_is_no_slice_of_rows_takes_the_plain_way(confined_linear):
    linear, basis, _ = confined_linear
    fetched = torch.randn(8, 12)
    views = [
        fetched[:, :6],  # half of each row
        fetched[:, 3:9],
        torch.randn(6, 8).t(),
        torch.randn(5, 6)[::2],
        torch.randn(5, 6).reshape(5, 6),  # one fetched for this step alone
        torch.randn(49)[1:].view(8, 6),
        torch.randn(50)[1:49].view(8, 6),
    ]
    for x in views:
        torch.testing.assert_close(linear(x), x @ linear.weight.t())
        assert_projected(weight_gradient(linear, x), linear.weight, x, basis)


def test_halves_of_rows_are_rows_of_half_the_length(confined_linear):
    linear, basis, _ = confined_linear
    fetched = torch.randn(8, 12)
    for x in (fetched[2:4].view(4, 6), fetched.view(16, 6)[3:8], fetched[3:4, 6:]):
        torch.testing.assert_close(linear(x), x @ linear.weight.t(), atol=1e-5, rtol=1e-5)
        assert_projected(weight_gradient(linear, x), linear.weight, x, basis)


def test_inputs_that_need_a_gradient_get_it(confined_linear):
    linear, _, _ = confined_linear
    fetched = torch.randn(20, 6, requires_grad=True)
    linear(fetched[:5]).sum().backward()
    torch.testing.assert_close(fetched.grad[:5], linear.weight.detach().sum(0).expand(5, 6))


def test_data_in_another_memory_order_is_projected_too(confined_linear):
    linear, basis, _ = confined_linear
    data = torch.randn(30, 3, 2).transpose(1, 2)
    fetched = data.index_select(0, torch.arange(20))
    mark_drawn(fetched, data, torch.arange(20))
    x = fetched[5:10].flatten(1)
    torch.testing.assert_close(linear(x), x @ linear.weight.t(), atol=1e-5, rtol=1e-5)
    assert_projected(weight_gradient(linear, x), linear.weight, x, basis)


def test_data_too_large_is_projected_step_by_step(confined_linear, monkeypatch):
    linear, basis, _ = confined_linear
    data = torch.randn(30, 6)
    fetched = data[torch.arange(20)]
    mark_drawn(fetched, data, torch.arange(20))
    monkeypatch.setattr(ahead, "DATA_ELEMENTS", 10)
    for limit in (1 << 22, 10):
        monkeypatch.setattr(ahead, "FETCHED_ELEMENTS", limit)
        linear.ahead = ahead.InputsAhead(Projection(basis))
        x = fetched[5:10]
        assert (linear.ahead.of(x, linear.weight) is None) == (limit == 10)
        assert_projected(weight_gradient(linear, x), linear.weight, x, basis)


def test_under_autocast_a_confined_layer_computes_in_full_precision():
    linear = nn.Linear(20, 30, bias=False)
    M = torch.linalg.qr(torch.randn(20, 5))[0]
    confinement.ConfinedLinear.attach(linear, Projection(M), False)
    x = torch.randn(4, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear(nn.Linear(20, 20)(x))
    out.square().sum().backward()
    assert out.dtype == torch.float32
    assert float(linear.weight.grad.norm()) > 0
    assert float((linear.weight.grad @ M).norm()) <= 1e-5 * float(linear.weight.grad.norm())
