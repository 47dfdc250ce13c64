"""The networks' dropout: distributed as torch's, by the same generator, off when torch's is off."""

import math

import pytest
import torch
from torch import nn

from cl_bench.models import MLP, AlexNetCL, Dropout

N = 200_000


@pytest.mark.parametrize("p", [0.01, 0.2, 0.5, 0.9])
def test_drops_the_share_p_and_scales_what_stays(p):
    torch.manual_seed(0)
    out = Dropout(p)(torch.ones(N))
    stay = out != 0
    assert abs(float(stay.double().mean()) - (1 - p)) < 4 * math.sqrt(p * (1 - p) / N)
    assert torch.allclose(out[stay], torch.tensor(1 / (1 - p)))
    neighbours = (stay[1:] & stay[:-1]).double().mean()  # drawn independently
    assert abs(float(neighbours) - (1 - p) ** 2) < 8 * math.sqrt(p * (1 - p) / N)


def test_the_gradient_passes_where_the_value_did():
    torch.manual_seed(0)
    x = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    out = Dropout(0.3)(x)
    out.sum().backward()
    assert torch.allclose(x.grad * x.detach(), out.detach())
    assert 0 < int((x.grad == 0).sum()) < 1000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keeps_the_dtype_and_its_input(dtype):
    torch.manual_seed(0)
    x = torch.ones(N, dtype=dtype)
    out = Dropout(0.001)(x)
    assert out.dtype == dtype
    assert bool((x == 1).all())
    # bfloat16 has no value near 0.001 that uniform numbers of its own could be told by
    assert 0.0007 < float((out == 0).double().mean()) < 0.0013


def test_follows_the_global_generator():
    x = torch.ones(1000)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(Dropout(0.5)(x))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_ends_of_the_range_are_those_of_torch(p):
    x = torch.randn(100)
    assert torch.equal(Dropout(p)(x), nn.Dropout(p)(x))


def test_in_place_it_is_torchs():
    x = torch.ones(1000)
    torch.manual_seed(0)
    expected = nn.Dropout(0.5)(x)
    torch.manual_seed(0)
    Dropout(0.5, inplace=True)(x)
    assert torch.equal(x, expected)
    assert 0 < int((x == 0).sum()) < 1000


def test_does_nothing_in_evaluation():
    x = torch.randn(100)
    assert torch.equal(Dropout(0.5).eval()(x), x)


@pytest.mark.parametrize(
    ("network", "rates"),
    [
        (MLP((8,), (4, 4), dropout=(0.2, 0.5)), [0.2, 0.5]),
        (AlexNetCL((3, 32, 32)), [0.2, 0.2, 0.5, 0.5, 0.5]),
    ],
)
def test_networks_drop_at_the_published_rates(network, rates):
    assert [m.p for m in network.modules() if isinstance(m, nn.Dropout)] == rates
