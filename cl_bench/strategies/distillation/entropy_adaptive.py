"""Entropy-Adaptive Fine-Tuning (Diao et al., 2026, arXiv:2601.02151, "EAFT").

What a model is sure of and the label denies is what a step on it destroys. Every token's loss is
weighted by how unsure the model is there,

    L = - sum_t H_t / ln K log P(y_t | ...),   H_t = - sum_{k in top K} q_k ln q_k,

q being the softmax over the K largest logits; no gradient goes through the weight.

The loss with its normalised entropy is that of the authors' README (github.com/PRIS-CV/EAFT,
0ce8772). K = 20 and a power of the weight are those of axolotl's version, which names the authors'
code; whether the paper takes the mean over tokens or over weights was not verified: here it is over
tokens, so that what is sure counts as learned.
"""

import math
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cl_bench.contracts import Batch, Learner, Loss, Needs, Strategy
from cl_bench.contracts.options import Range, Rate


class EntropyAdaptive(Strategy):
    """Tokens of which the model is sure count less.

    Args:
        top: K, the likeliest tokens that the entropy is taken over.
        power: of the weight.
    """

    needs = Needs(modalities=frozenset({"text"}))

    def __init__(self, top: Annotated[int, Range(least=2)] = 20, power: Rate = 1.0) -> None:
        self.top = top
        self.power = power

    def objective(self, learner: Learner, batch: Batch, out: Tensor) -> Loss:
        """The weighted loss over all labelled tokens."""
        logits, labels = learner.predictions(out, batch)
        losses = cross_entropy(logits, labels, reduction="none")
        return Loss((self.weights(logits) * losses).double().sum(), len(labels))

    @torch.no_grad()
    def weights(self, logits: Tensor) -> Tensor:
        """Of every token, in [0, 1] (m,)."""
        count = min(self.top, logits.shape[1])
        sure = logits.topk(count, dim=1).values.log_softmax(1)
        entropy = -(sure.exp() * sure).sum(1)
        return (entropy / math.log(count)).clamp(0, 1) ** self.power
