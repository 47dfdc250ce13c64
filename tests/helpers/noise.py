"""A network with everything that has a state of its own."""

import torch
from torch import nn
from toys import DIM


def noisy():
    """Everything with a state of its own: statistics, random numbers, modes."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(DIM, 10),
        nn.BatchNorm1d(10),
        nn.Dropout(0.5),
        nn.ReLU(),
        nn.Linear(10, 8, bias=False),
        nn.LayerNorm(8),
    )
