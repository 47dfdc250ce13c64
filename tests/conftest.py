"""What all tests share: reproducible randomness."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("cl_bench", deadline=None, derandomize=True, database=None)
settings.load_profile("cl_bench")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
