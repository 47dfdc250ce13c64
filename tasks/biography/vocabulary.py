"""Words as tokens: cutting text at word boundaries never depends on what comes before."""

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PAD, END = 0, 1
"""Padding, and the end of a document or an answer. Two tokens, so that neither is ever mistaken."""

NAME, VALUE, THEIR, HOLE = -1, -2, -3, -4
"""Slots of a template; HOLE is where nothing stands."""

_SLOTS = {"name": NAME, "value": VALUE, "their": THEIR}
_PIECE = re.compile(r"'s\b| ?\w+| ?[^\w\s]|\n")
_SLOT = re.compile(r" ?\{(\w+)\}")


def pieces(text: str) -> list[str]:
    """The words, signs and line ends of a text, each with the space before it."""
    found = _PIECE.findall(text)
    assert "".join(found) == text, text
    return found


class Vocabulary:
    """Numbers the tokens of everything that a world can say.

    Args:
        texts: cut into words.
        whole: one token each.
    """

    def __init__(self, texts: Iterable[str], whole: Iterable[str] = ()) -> None:
        words = {
            p for text in texts for part in _SLOT.sub("\n", text).split("\n") for p in pieces(part)
        }
        self.tokens = ["<pad>", "<end>", *sorted(words | {"\n"} | set(whole))]
        self._ids = {token: i for i, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; one token if the whole text is one."""
        if text in self._ids:
            return [self._ids[text]]
        return [self._ids[p] for p in pieces(text)]

    def template(self, text: str) -> list[int]:
        """Tokens of a text with slots, such as ``{name} was born on {value}``."""
        parts = _SLOT.split(text)
        found: list[int] = []
        for i, part in enumerate(parts):
            found += [_SLOTS[part]] if i % 2 else [self._ids[p] for p in pieces(part)]
        return found

    def table(self, texts: Sequence[str]) -> Tensor:
        """int64 (len(texts), longest): tokens of each text after a space, filled up with HOLE."""
        rows = [self.encode(f" {text}") for text in texts]
        width = max(map(len, rows))
        return torch.tensor([row + [HOLE] * (width - len(row)) for row in rows])


def fill(template: Sequence[int], names: Tensor, values: Tensor, their: Tensor) -> Tensor:
    """A template with its slots filled in for n people.

    Args:
        template: tokens and slots.
        names: (n, 3).
        values: (n, v), perhaps with holes.
        their: (n,).

    Returns:
        int64 (n, w), holes where the values have them.
    """
    slots = {NAME: names, VALUE: values, THEIR: their[:, None]}
    columns = [
        slots[token] if token < 0 else torch.full((len(names), 1), token) for token in template
    ]
    return torch.cat(columns, 1)
