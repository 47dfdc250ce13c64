"""Transformers' T5, made from scratch at any size."""

from typing import Any

from torch import nn

from cl_bench.contracts import UsageError
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, PartShare, Rate
from cl_bench.models.gpt import require_transformers


@checked("model.")
def t5(
    vocabulary: int,
    depth: Count = 2,
    width: Count = 64,
    heads: Count = 4,
    feed_forward: Count = 256,
    gated: bool = False,
    tied: bool = True,
    scaled: bool = True,
    dropout: PartShare = 0.0,
    initial_scale: Rate = 1.0,
) -> nn.Module:
    """A T5 with random weights, drawn from torch's global generator.

    Args:
        vocabulary: number of tokens.
        depth: blocks of the encoder, and of the decoder.
        width: of the residual stream.
        heads: attention heads of a block.
        feed_forward: width of the MLPs.
        gated: gated GELU in the MLPs, as T5 v1.1 has it, instead of ReLU.
        tied: whether the output layer shares the input embedding's weight (T5 v1.0).
        scaled: whether what enters the output layer is divided by sqrt(width) (T5 v1.0).
        dropout: everywhere T5 has it.
        initial_scale: times the standard deviations of T5's initial weights; its embeddings begin
            at 1.

    Raises:
        UsageError: transformers is not installed, or the sizes do not fit together.
    """
    if width % heads:
        raise UsageError(f"model.width={width}, model.heads={heads}: heads must divide the width")
    require_transformers()
    from transformers import T5Config, T5ForConditionalGeneration

    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "num_layers": depth,
        "d_model": width,
        "d_ff": feed_forward,
        "d_kv": width // heads,
        "num_heads": heads,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "tie_word_embeddings": scaled,  # what T5's configuration makes of this name
        "dropout_rate": dropout,
        "initializer_factor": initial_scale,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    config = T5Config(**settings)
    config.tie_word_embeddings = tied
    model: Any = T5ForConditionalGeneration(config)
    model.set_input_embeddings(model.shared)  # of encoder and decoder, whatever the output has
    made: nn.Module = model
    return made
