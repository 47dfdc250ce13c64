"""Scores of one generated answer, in [0, 1]."""

import string
from collections.abc import Callable

PUNCTUATION = str.maketrans("", "", string.punctuation)

Metric = Callable[[str, str, str], float]
"""Score from the prompt's text, the right answer and the given one."""


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation, white space collapsed; articles stay.

    As O-LoRA's evaluation does it, which follows SQuAD's but for the articles.
    """
    return " ".join(text.lower().translate(PUNCTUATION).split())


def exact_match(text: str, right: str, given: str) -> float:
    """1 where both are the same once normalised; an empty answer is wrong."""
    found = normalised(given)
    return float(bool(found) and found == normalised(right))
