"""Tokenizers: a pretrained model's own, or bytes where there is none."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.language import Codec
from cl_bench.hub import hub_reachable

BYTES = "bytes"
"""Name of the tokenizer that needs no files: ByT5's, a token a byte."""


class PretrainedCodec:
    """One of transformers' tokenizers.

    Args:
        tokenizer: with an end token; without a padding token, the end token pads.
        name: what the configuration calls it.

    Attributes:
        tokenizer: the same.

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
        self.tokenizer = tokenizer
        self.end: int = tokenizer.eos_token_id
        pad = tokenizer.pad_token_id
        self.pad: int = self.end if pad is None else pad
        self.pieces: Sequence[str] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        bare = self._ids("a", add_special_tokens=False)
        whole = self._ids("a")
        at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        self._opening: list[int] = whole[:at]
        self.closing: Sequence[int] = whole[at + len(bare) :]

    @cached_property
    def content(self) -> str | None:
        """Hash of all that tokens follow from; None of a tokenizer that does not say."""
        if not getattr(self.tokenizer, "is_fast", False):
            return None
        rules = f"{self._opening} {self.tokenizer.backend_tokenizer.to_str()}"
        return hashlib.sha256(rules.encode()).hexdigest()

    def _ids(self, text: str, **options: Any) -> list[int]:
        # A prompt longer than the model's positions is cut by whoever asks.
        ids: list[int] = self.tokenizer(text, verbose=False, **options)["input_ids"]
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
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class WordCodec:
    """A token for each of the commonest words, lower case; numbers and punctuation are words.

    Args:
        texts: where words are counted.
        size: tokens, three special ones included: padding, end, and any other word.
        keep: words that are tokens whatever their count.
    """

    def __init__(self, texts: Iterable[str], size: int, keep: Iterable[str]) -> None:
        counts = Counter(word for text in texts for word in _words(text))
        kept = dict.fromkeys(word for text in keep for word in _words(text))
        common = sorted(counts, key=lambda word: (-counts[word], word))
        chosen = dict.fromkeys([*SPECIAL, *kept, *common])
        self.pieces: Sequence[str] = tuple(chosen)[:size]
        self.name = f"{size} words"
        self.pad, self.end = 0, 1
        self.closing: Sequence[int] = ()
        self._number = {word: i for i, word in enumerate(self.pieces)}

    def encode(self, text: str, opening: bool = False) -> list[int]:
        """Tokens of a text."""
        return [self._number.get(word, OTHER) for word in _words(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        """The words, a space between them, up to the first end token."""
        ids = list(tokens)
        if self.end in ids:
            ids = ids[: ids.index(self.end)]
        return " ".join(self.pieces[i] for i in ids if i >= OTHER)


SPECIAL = ("<pad>", "<end>", "<other>")

OTHER = 2

_WORD = re.compile(r"\w+|[^\w\s]")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def load_tokenizer(name: str) -> Any:
    """The tokenizer called ``bytes``, in a folder, or on the hub, as transformers has it.

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
        return ByT5Tokenizer(extra_ids=0)
    try:
        # Without network, transformers would try for half a minute.
        local = Path(name).is_dir() or not hub_reachable()
        # False: not even asked whether code that lies beside the tokenizer may run.
        return AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError) as error:
        where = "in that folder" if Path(name).is_dir() else "no such folder, nor on the hub"
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"stream.tokenizer={name}: no tokenizer ({where}: {reason}). Name a folder that "
            "save_pretrained wrote (model=hub model.name_or_path=/path/to/it), or run offline "
            "with a byte-level model: model=t5_tiny or model=gpt_tiny"
        ) from error


def load_codec(name: str) -> Codec:
    """The tokenizer called ``bytes``, in a folder, or on the hub.

    Raises:
        UsageError: transformers is missing, or the tokenizer is.
    """
    return PretrainedCodec(load_tokenizer(name), name)
