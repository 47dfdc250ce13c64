"""What ends a run through no fault of its code, said in one message that names the remedy."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cl_bench.contracts import UsageError
from cl_bench.experiment.loop import LoopSettings

SIGNS = ("can't allocate memory", "not enough memory", "out of memory")
"""How PyTorch's allocators say it where they raise a plain ``RuntimeError``."""


@contextmanager
def memory_explained(loop: LoopSettings, eval_batch_size: int) -> Iterator[None]:
    """Inside, an allocation that fails becomes a :class:`UsageError`.

    Args:
        loop: how tasks are fed.
        eval_batch_size: samples of a batch in evaluation.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise UsageError(
            f"out of memory with batch_size={loop.batch_size}, eval.batch_size={eval_batch_size} "
            f"({said}): a smaller batch_size with trainer.accumulate_grad_batches and pack=1 "
            "learns the same number of samples a step in less memory; a smaller eval.batch_size, "
            "a smaller model=... or trainer.precision=bf16-mixed with pack=1 need less too; "
            "what was recorded before is intact"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the host or a device, could not be had."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
    )
