"""Words that both answers share, as SQuAD counts them."""

import re
from collections import Counter

from cl_bench.metrics.answers.answer import AnswerMetric, normalised

ARTICLES = re.compile(r"\b(a|an|the)\b")


def f1(text: str, right: str, given: str) -> float:
    """Harmonic mean of precision and recall of words, repeats counted; an empty answer scores 0.

    Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", EMNLP 2016,
    section 6.1: punctuation and articles are left out.
    """
    wanted, found = (ARTICLES.sub(" ", normalised(part)).split() for part in (right, given))
    common = (Counter(wanted) & Counter(found)).total()
    return 2 * common / (len(wanted) + len(found)) if common else 0.0


METRIC = AnswerMetric(f1)
