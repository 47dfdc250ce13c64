"""Transformers' causal language models, made from scratch at any size."""

from typing import TYPE_CHECKING, Literal

from torch import nn

from cl_bench.contracts import UsageError
from cl_bench.contracts.checking import checked
from cl_bench.contracts.options import Count, PartShare

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@checked("model.")
def gpt(
    vocabulary: int,
    architecture: Literal["gpt_neox", "gpt2"] = "gpt_neox",
    depth: Count = 4,
    width: Count = 96,
    heads: Count = 4,
    context: Count = 512,
    tied: bool = False,
    dropout: PartShare = 0.0,
) -> nn.Module:
    """A GPT with random weights, drawn from torch's global generator.

    Args:
        vocabulary: number of tokens.
        architecture: ``gpt_neox`` (Pythia's; rotary positions) or ``gpt2`` (learned positions).
        depth: blocks.
        width: of the residual stream; the MLPs are four times as wide.
        heads: attention heads of a block.
        context: longest sequence.
        tied: whether the output layer shares the input embedding's weight.
        dropout: everywhere the architecture has it.

    Raises:
        UsageError: transformers is not installed, or the sizes do not fit together.
    """
    if width % heads:
        raise UsageError(f"model.width={width}, model.heads={heads}: heads must divide the width")
    make = _gpt_neox if architecture == "gpt_neox" else _gpt2
    return make(vocabulary, depth, width, heads, context, tied, dropout)


def require_transformers() -> None:
    """Raise :class:`UsageError` unless transformers can be imported."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "language models need the package 'transformers', which is not installed: "
            "pip install 'cl_bench[language]'"
        ) from error


def _gpt_neox(
    vocabulary: int,
    depth: int,
    width: int,
    heads: int,
    context: int,
    tied: bool,
    dropout: float,
) -> "PreTrainedModel":
    require_transformers()
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=vocabulary,
            num_hidden_layers=depth,
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=heads,
            max_position_embeddings=context,
            tie_word_embeddings=tied,
            hidden_dropout=dropout,
            attention_dropout=dropout,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _gpt2(
    vocabulary: int,
    depth: int,
    width: int,
    heads: int,
    context: int,
    tied: bool,
    dropout: float,
) -> "PreTrainedModel":
    require_transformers()
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_layer=depth,
            n_embd=width,
            n_head=heads,
            n_positions=context,
            tie_word_embeddings=tied,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
