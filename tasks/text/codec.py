"""Tokenizers: a pretrained model's own, or bytes where there is none."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.language import Codec

BYTES = "bytes"
"""Name of the tokenizer that needs no files: ByT5's, a token a byte."""


class PretrainedCodec:
    """One of transformers' tokenizers.

    Args:
        tokenizer: with an end token; without a padding token, the end token pads.
        name: what the configuration calls it.

    Raises:
        UsageError: it has no end token.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        if tokenizer.eos_token_id is None:
            raise UsageError(
                f"stream.tokenizer={name}: it has no end token, so no answer would ever end; "
                "set eos_token in its tokenizer_config.json"
            )
        self.name = name
        self._tokenizer = tokenizer
        self.end: int = tokenizer.eos_token_id
        pad = tokenizer.pad_token_id
        self.pad: int = self.end if pad is None else pad
        self.pieces: Sequence[str] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        bare = self._ids("a", add_special_tokens=False)
        whole = self._ids("a")
        at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        self._opening: list[int] = whole[:at]
        self.closing: Sequence[int] = whole[at + len(bare) :]

    def _ids(self, text: str, **options: Any) -> list[int]:
        # A prompt longer than the model's positions is cut by whoever asks.
        ids: list[int] = self._tokenizer(text, verbose=False, **options)["input_ids"]
        return ids

    def encode(self, text: str, opening: bool = False) -> list[int]:
        """Tokens of a text; with ``opening`` after what stands before a prompt."""
        ids = self._ids(text, add_special_tokens=False)
        return [*self._opening, *ids] if opening else ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, up to the first end token and without special ones."""
        ids = list(tokens)
        if self.end in ids:
            ids = ids[: ids.index(self.end)]
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def load_codec(name: str) -> Codec:
    """The tokenizer called ``bytes``, in a folder, or on the hub.

    Raises:
        UsageError: transformers is missing, or the tokenizer is.
    """
    try:
        from transformers import AutoTokenizer, ByT5Tokenizer
    except ImportError as error:
        raise UsageError(
            "language streams need the package 'transformers', which is not installed: "
            "pip install 'cl_bench[language]'"
        ) from error
    if name == BYTES:
        return PretrainedCodec(ByT5Tokenizer(extra_ids=0), name)
    try:
        return PretrainedCodec(AutoTokenizer.from_pretrained(name), name)
    except (OSError, ValueError) as error:
        where = "in that folder" if Path(name).is_dir() else "no such folder, nor on the hub"
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"stream.tokenizer={name}: no tokenizer ({where}: {reason}). Name a folder that "
            "save_pretrained wrote (model=hub model.name_or_path=/path/to/it), or run offline "
            "with a byte-level model: model=t5_tiny or model=gpt_tiny"
        ) from error
