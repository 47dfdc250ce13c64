"""What a CPU learns a GPU learns too: `pytest -m gpu`. Not seen on one yet."""

import pytest
import torch
from together import CASES, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("name", CASES)
def test_a_gpu_comes_to_what_a_cpu_does(name, tmp_path):
    cpu = run(name, tmp_path / "cpu")
    gpu = run(name, tmp_path / "gpu", accelerator="gpu")
    for key, weight in cpu["weights"].items():
        torch.testing.assert_close(gpu["weights"][key].cpu(), weight, rtol=1e-7, atol=1e-9)
    for key, projector in cpu["bases"].items():
        torch.testing.assert_close(gpu["bases"][key].cpu(), projector, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["gpm", "gpm-adam", "rogo", "sgp"])
def test_half_precision_on_a_gpu_keeps_weights_and_bases_in_full(name, tmp_path):
    found = run(name, tmp_path / "run", accelerator="gpu", precision="bf16-mixed")
    assert all(w.dtype == torch.float64 for w in found["weights"].values() if w.is_floating_point())
    for projector in found["bases"].values():
        torch.testing.assert_close(projector @ projector, projector, rtol=0, atol=1e-6)
