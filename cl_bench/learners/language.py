"""The learner that fits a language model, whichever kind it is."""

from typing import Any

from torch import nn

from cl_bench.contracts import LanguageStream, UsageError
from cl_bench.learners.causal import Causal
from cl_bench.learners.seq2seq import Seq2Seq
from cl_bench.learners.text import LanguageLearner
from cl_bench.optimizers import OptimizerFactory


def language(
    stream: LanguageStream,
    model: nn.Module,
    optimizer: OptimizerFactory,
    batch_size: int,
    seed: int,
    pack: int = 1,
    gradient_checkpointing: bool = False,
    label_likelihood: bool = False,
    packing: bool = False,
) -> LanguageLearner:
    """The learner that a language model needs: causal, or sequence-to-sequence.

    Raises:
        UsageError: as that learner does, or the latter is to pack samples.
    """
    options: dict[str, Any] = {
        "gradient_checkpointing": gradient_checkpointing,
        "label_likelihood": label_likelihood,
    }
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return Causal(stream, model, optimizer, batch_size, seed, pack, packing=packing, **options)
    if packing:
        raise UsageError(
            f"learner.packing=true: {type(model).__name__} is an encoder-decoder, whose samples "
            "cannot share a sequence; use learner.packing=false"
        )
    return Seq2Seq(stream, model, optimizer, batch_size, seed, pack, **options)
