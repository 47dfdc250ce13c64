"""The papers' networks: sizes, features, norms, and every strategy on them."""

import functools

import pytest
import torch
from torch import nn

from cl_bench.contracts import UsageError
from cl_bench.models import AlexNetCL, LeNet, ResNet18Small

PAPERS = {
    "alexnet": (functools.partial(AlexNetCL, width=64), 64, 5),
    "lenet": (functools.partial(LeNet, widths=(40, 30)), 30, 4),
    "resnet": (functools.partial(ResNet18Small, nf=4), 128, 20),
    "resnet strided": (functools.partial(ResNet18Small, nf=4, stem_stride=2), 32, 20),
}


@pytest.mark.parametrize("network", PAPERS)
def test_the_papers_networks_give_features(network):
    make_network, width, layers = PAPERS[network]
    model = make_network((3, 32, 32))
    assert model.training
    x = torch.randn(4, 3, 32, 32)
    assert model(x).shape == (4, width)
    assert not any(
        isinstance(m, nn.Conv2d | nn.Linear) and m.bias is not None for m in model.modules()
    )
    found = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(found) == layers
    biased = make_network((3, 32, 32), bias=True)
    assert all(m.bias is not None for m in biased.modules() if isinstance(m, nn.Conv2d | nn.Linear))


def test_the_papers_networks_have_the_papers_sizes():
    sizes = {
        name: [tuple(p.shape) for p in model((3, 32, 32)).parameters() if p.dim() > 1]
        for name, model in {"alexnet": AlexNetCL, "lenet": LeNet}.items()
    }
    assert sizes["alexnet"] == [
        (64, 3, 4, 4),
        (128, 64, 3, 3),
        (256, 128, 2, 2),
        (2048, 1024),
        (2048, 2048),
    ]
    assert sizes["lenet"] == [(20, 3, 5, 5), (50, 20, 5, 5), (800, 3200), (500, 800)]
    assert ResNet18Small((3, 84, 84), stem_stride=2)(torch.randn(2, 3, 84, 84)).shape[1] == 160 * 9


@pytest.mark.parametrize("make_network", [AlexNetCL, ResNet18Small])
def test_the_norm_policy_says_what_evaluation_normalises_with(make_network):
    options = {"width": 32} if make_network is AlexNetCL else {"nf": 4}
    x = torch.randn(6, 3, 32, 32)
    for norm, depends in (("batch_statistics", True), ("running_statistics", False)):
        model = make_network((3, 32, 32), norm=norm, **options).eval()
        with torch.no_grad():
            alone, beside = model(x[:3]), model(x)[:3]
        assert torch.allclose(alone, beside, atol=1e-5) != depends
    with pytest.raises(UsageError, match=r"model\.norm=none"):
        make_network((3, 32, 32), norm="none", **options)


@pytest.mark.parametrize("make_network", [AlexNetCL, LeNet, ResNet18Small])
def test_inputs_that_do_not_fit_are_refused(make_network):
    with pytest.raises(UsageError, match="use model="):
        make_network((64,))
