"""What all tests share: reproducible randomness, and processes that do not share W&B's service."""

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("cl_bench", deadline=None, derandomize=True, database=None)
settings.load_profile("cl_bench")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_wandb_service():
    """W&B names its service in the environment; a child that is killed would leave its run open."""
    os.environ.pop("WANDB_SERVICE", None)
    yield
    os.environ.pop("WANDB_SERVICE", None)
