"""What a metric of one sample's answer is, and how texts are compared."""

import importlib
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from cl_bench.errors import UsageError

Grade = Callable[[str, str, str], float]
"""Score in [0, 1] from the prompt's text, the right answer and the given one."""

Sees = Literal["answer", "choice", "loss"]
"""What is scored: the answer as it is generated; which of the allowed answers is the likeliest; or
how likely the right answer is."""


@dataclass(frozen=True)
class AnswerMetric:
    """A score of one sample in [0, 1], of which more is better.

    Attributes:
        grade: of an answer; None where the model's likelihoods are the score.
        sees: what is scored.
        require: raises :class:`UsageError` if a package is missing.
    """

    grade: Grade | None
    sees: Sees = "answer"
    require: Callable[[], Any] | None = None


PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation, white space collapsed; articles stay.

    As O-LoRA's evaluation does it, which follows SQuAD's but for the articles.
    """
    return " ".join(text.lower().translate(PUNCTUATION).split())


def needed(module: str, metric: str, package: str) -> Any:
    """A package that a metric uses.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"the metric {metric} needs a package that is not installed: pip install {package}"
        ) from error
