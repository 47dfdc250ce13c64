"""Random matrices and bases, and layers of every kind."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

small = settings(max_examples=40)
seeds = st.integers(0, 10_000)


def randn(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthonormal(d, k, seed=0):
    return torch.linalg.qr(randn(seed, d, d))[0][:, :k]


def projector(basis):
    return basis @ basis.t()


def assert_orthonormal(basis, tolerance=1e-10):
    torch.testing.assert_close(
        basis.t() @ basis, torch.eye(basis.shape[1]).to(basis), atol=tolerance, rtol=0
    )


class Conv1D(nn.Module):
    """Hugging Face's linear layer: stores W^T."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).reshape(
            *x.shape[:-1], self.nf
        )


LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (7, 5)),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), (7, 5)),
    "linear on tokens": (lambda: nn.Linear(5, 4), (3, 2, 5)),
    "Conv1D of Hugging Face": (lambda: Conv1D(4, 5), (3, 2, 5)),
    "conv": (lambda: nn.Conv2d(2, 3, (3, 2)), (3, 2, 6, 5)),
    "conv stride and padding": (lambda: nn.Conv2d(2, 3, 3, stride=(2, 3), padding=1), (3, 2, 6, 5)),
    "conv padding by axis": (lambda: nn.Conv2d(2, 3, 3, padding=(0, 2)), (3, 2, 6, 5)),
    "conv dilation": (lambda: nn.Conv2d(2, 3, 2, dilation=(3, 2), bias=False), (3, 2, 6, 5)),
    "conv same": (lambda: nn.Conv2d(2, 3, (2, 4), padding="same"), (3, 2, 6, 5)),
    "conv valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid"), (3, 2, 6, 5)),
    "conv circular": (
        lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"),
        (3, 2, 6, 5),
    ),
    "conv reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (3, 2, 6, 5)),
    "conv same replicate": (
        lambda: nn.Conv2d(2, 3, 2, padding="same", padding_mode="replicate", dilation=3),
        (3, 2, 6, 5),
    ),
    "conv groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (3, 4, 6, 5)),
    "conv depthwise": (lambda: nn.Conv2d(3, 6, 2, groups=3, stride=2), (3, 3, 6, 5)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2), (3, 2, 9)),
    "conv1d same circular": (
        lambda: nn.Conv1d(2, 4, 4, padding="same", padding_mode="circular", groups=2),
        (3, 2, 9),
    ),
}


@pytest.fixture(params=LAYERS, name="case")
def case_(request):
    make, shape = LAYERS[request.param]
    return make(), torch.randn(shape)
