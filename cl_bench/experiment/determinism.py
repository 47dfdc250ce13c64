"""``deterministic=true``: only algorithms that give the same bits again, and what that promises."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cl_bench.contracts import UsageError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def statement(asked: bool, on_cuda: bool) -> str:
    """What is bit-exact in a run, in a sentence or two."""
    threads, cpu = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    same = f"the same package versions, this kind of CPU ({cpu}) and {threads} thread(s)"
    if not on_cuda:
        promise = f"bit for bit the same again with {same}; not with another of them"
        if asked:
            return f"deterministic=true: {promise}"
        return f"deterministic=false: on the CPU, expected to be {promise}"
    gpu = torch.cuda.get_device_name()
    if not asked:
        return (
            f"deterministic=false: on {gpu} some sums are added up in an order that differs from "
            "run to run, so results may differ in their last digits, and from there on"
        )
    return (
        f"deterministic=true: deterministic algorithms of CUDA, cuDNN and cuBLAS on {gpu}; the "
        f"same bits again with the same kind of GPU, driver and {same}; not with another of "
        "them, and not the bits of a CPU"
    )


def describe_compute() -> dict[str, Any]:
    """What bits depend on beside package versions."""
    on_cuda = torch.cuda.is_available()
    return {
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if on_cuda else None,
        "cuda": torch.version.cuda if on_cuda else None,
    }


@contextmanager
def deterministically(asked: bool) -> Iterator[None]:
    """Inside, PyTorch takes deterministic algorithms, or raises :class:`UsageError` without one.

    Afterwards everything is as before: the next run of this process decides for itself.
    """
    if not asked:
        yield
        return
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    workspace = os.environ.get(WORKSPACE)
    # cuBLAS reads it when it is first used.
    os.environ.setdefault(WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise UsageError(
            f"deterministic=true: {str(error).splitlines()[0]}; use deterministic=false, or a "
            "model without that operation"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]
        if workspace is None:
            os.environ.pop(WORKSPACE, None)
