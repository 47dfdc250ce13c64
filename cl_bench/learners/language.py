"""The learner that fits a language model, whichever kind it is."""

from torch import nn

from cl_bench.contracts import LanguageStream
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
) -> LanguageLearner:
    """The learner that a language model needs: causal, or sequence-to-sequence.

    Raises:
        UsageError: as that learner does.
    """
    pairs = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    kind = Seq2Seq if pairs else Causal
    return kind(
        stream,
        model,
        optimizer,
        batch_size,
        seed,
        pack,
        gradient_checkpointing=gradient_checkpointing,
        label_likelihood=label_likelihood,
    )
