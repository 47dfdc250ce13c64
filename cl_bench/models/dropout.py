"""Dropout that is quick on a CPU."""

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """``nn.Dropout``, its mask from uniform numbers when on a CPU.

    Torch's Bernoulli numbers take a sixth of a training step of FOT's network there and a fifth of
    AlexNet's (``tests/benchmarks/dropout.py``). The mask has torch's distribution and follows
    torch's generator, with other draws. Elsewhere, and in place, this is ``nn.Dropout`` itself.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The input with a share p of it at 0 and the rest divided by 1 - p, in training."""
        plain = self.inplace or self.p in (0.0, 1.0) or input.device.type != "cpu"
        if plain or not self.training:
            return super().forward(input)
        uniform = torch.rand(input.shape)  # float32: bfloat16 has too few values near p
        kept = uniform.ge_(self.p).mul_(1.0 / (1.0 - self.p))
        return input * kept.to(input.dtype)
