"""Blocks of a network as compiled programs, where training asks for outputs and nowhere else.

Generation, taps and per-sample gradients run the network as it is: they look into it, or come with
shapes of their own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Compiled:
    """The blocks' programs, which are made when they are first run.

    Args:
        blocks: alike, so that one program serves them all.
        backend: of ``torch.compile``.
    """

    def __init__(self, blocks: Sequence[nn.Module], backend: str) -> None:
        self._programs: list[tuple[nn.Module, Any]] = [
            (block, torch.compile(block.forward, backend=backend)) for block in blocks
        ]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the blocks run as programs."""
        # What a strategy hooks into a layer after it was compiled must not be left out.
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            for block, program in self._programs:
                block.forward = program
            try:
                yield
            finally:
                for block, _ in self._programs:
                    del block.__dict__["forward"]
