"""Texts as rows of token ids, for networks that tell classes of texts apart."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cl_bench.contracts.errors import UsageError
from cl_bench.hub import hub_reachable

BYTES = "bytes"
"""Name of the tokenizer that needs no files: b + 1 stands for byte b, 257 begins a text, 0 pads."""


class Tokens(Protocol):
    """Makes rows of token ids.

    Attributes:
        identity: names what it does: another one gives other ids.
        pad: id of padding.
        size: ids there are.
    """

    identity: str
    pad: int
    size: int

    def __call__(self, texts: Sequence[str], length: int) -> Tensor:
        """int64 (n, length), padded at the end; a longer text loses its end."""


class ByteTokens:
    """UTF-8 bytes."""

    identity, pad, size = BYTES, 0, 258

    def __call__(self, texts: Sequence[str], length: int) -> Tensor:
        """int64 (n, length)."""
        ids = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            found = [256, *text.encode()][:length]
            row[: len(found)] = torch.tensor(found) + 1
        return ids


class PretrainedTokens:
    """One of transformers' tokenizers, with the special tokens that it puts around a text.

    Args:
        tokenizer: has a padding token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.pad, self.size = int(tokenizer.pad_token_id), len(tokenizer)
        words = "\n".join(tokenizer.convert_ids_to_tokens(list(range(self.size))))
        rule = getattr(tokenizer, "backend_tokenizer", None)
        said = rule.to_str() if rule is not None else f"{type(tokenizer).__name__}\n{words}"
        self.identity = hashlib.sha256(said.encode()).hexdigest()

    def __call__(self, texts: Sequence[str], length: int) -> Tensor:
        """int64 (n, length)."""
        found = self._tokenizer(
            list(texts),
            truncation=True,
            max_length=length,
            padding="max_length",
            padding_side="right",
            return_tensors="pt",
        )
        ids: Tensor = found["input_ids"]
        return ids


def load_tokens(name: str, option: str) -> Tokens:
    """The tokenizer called ``bytes``, in a folder, or on the hub.

    Args:
        name: of it.
        option: that names it, for messages.

    Raises:
        UsageError: transformers is missing, or the tokenizer is, or it has no padding.
    """
    if name == BYTES:
        return ByteTokens()
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UsageError(
            f"{option}={name}: tokenizers need the package 'transformers', which is not installed: "
            f"pip install 'cl_bench[language]', or {option}={BYTES}"
        ) from error
    try:
        # Without network, transformers would try for half a minute.
        local = Path(name).is_dir() or not hub_reachable()
        found = AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError) as error:
        where = "in that folder" if Path(name).is_dir() else "no such folder, nor on the hub"
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"{option}={name}: no tokenizer ({where}: {reason}); name a folder that "
            f"save_pretrained wrote, or {BYTES}"
        ) from error
    if found.pad_token_id is None:
        raise UsageError(f"{option}={name}: it has no padding token; set pad_token in its files")
    return PretrainedTokens(found)
