"""What ImageNet's classes are called, and which other classes are among them by name."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

CRITERION = (
    "by name: a class is among ImageNet's 1,000 if its name is one of theirs or the end of one "
    "(a brown bear is a bear); synonyms, plurals and parts of another meaning are not seen through"
)
SOURCE = "class names of ml-illustrated/EfficientNet-Lite-PyTorch @ dd7132c, labels_map.txt"


@cache
def imagenet_names() -> tuple[tuple[str, ...], ...]:
    """The names of each class, in ImageNet's order, lower case."""
    text = (Path(__file__).parent / "imagenet_names.txt").read_text(encoding="utf-8")
    return tuple(tuple(_plain(name) for name in line.split(", ")) for line in text.splitlines())


def among_imagenet(names: Sequence[str]) -> list[bool] | None:
    """Which classes ImageNet has too, by :data:`CRITERION`; None where these are no names.

    Numbers and WordNet's ids (``n01443537``) are none.
    """
    plain = [_plain(name) for name in names]
    if not names or any(not re.search("[a-z]{2}", name) for name in plain):
        return None
    ends = {
        " ".join(words[i:])
        for theirs in imagenet_names()
        for name in theirs
        for words in [name.split()]
        for i in range(len(words))
    }
    return [name in ends for name in plain]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", name.lower().replace("'", "")).strip()
