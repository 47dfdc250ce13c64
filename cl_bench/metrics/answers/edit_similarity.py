"""Edit similarity of code."""

import re

from cl_bench.metrics.answers.answer import AnswerMetric, needed

LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)


def edit_similarity(text: str, right: str, given: str) -> float:
    """Normalised indel similarity of code (package rapidfuzz), literals in place of their tags."""
    if not given:
        return 0.0
    plain = [_with_literals(code) for code in (right, given)]
    score: float = (
        needed("rapidfuzz.fuzz", "edit_similarity", "'cl_bench[language]'").ratio(*plain) / 100
    )
    return score


def _with_literals(code: str) -> str:
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    return LITERAL.sub(lambda match: match[1], code)


METRIC = AnswerMetric(edit_similarity, require=lambda: edit_similarity("", "a", "a"))
