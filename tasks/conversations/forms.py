"""What rows look like: conversations, prompts with completions, instructions, named columns."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cl_bench.contracts.errors import UsageError
from cl_bench.tasks.conversations.rows import Row, is_missing

Message = dict[str, str]
"""``role`` and ``content``."""

ROLES = ("system", "developer", "user", "assistant", "tool")

FORMS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ()),
    "prompt/completion": (("prompt", "completion"), ()),
    "prompt/answer": (("prompt", "answer"), ()),
    "instruction": (("instruction", "output"), ("input",)),
}
"""Keys that a row of a form must have, and those that it may have."""


@dataclass(frozen=True)
class Conversation:
    """A row, whatever its form.

    Attributes:
        place: file and row.
        messages: the last one is an answer.
        choices: the answers that are allowed, if the row says so.
        plain: whether it is one prompt with its answer, which needs no chat template.
    """

    place: str
    messages: Sequence[Message]
    choices: Sequence[str] = ()
    plain: bool = False

    @property
    def answer(self) -> str:
        """What the last turn says."""
        return self.messages[-1]["content"]

    @property
    def asked(self) -> str:
        """What the turn before it says."""
        return self.messages[-2]["content"] if len(self.messages) > 1 else ""


def conversations(
    rows: Sequence[Row], prompt: str | None, answer: str | None, key: str
) -> list[Conversation]:
    """Rows of one file as conversations.

    Args:
        rows: all of one form.
        prompt: template over the columns, ``"{question}"``; None where rows have a form of ours.
        answer: likewise; both or neither.
        key: what stands before the two in messages: ``stream.data[0].``.

    Raises:
        UsageError: a row is not of the form of the first one, or lacks something.
    """
    if (prompt is None) != (answer is None):
        raise UsageError(f"{key}prompt and {key}answer: give both templates, or neither")
    if prompt is not None and answer is not None:
        for name, template in (("prompt", prompt), ("answer", answer)):
            if not columns_of(template, f"{key}{name}"):
                raise UsageError(
                    f"{key}{name}={template}: names no column; write one as {{column}}"
                )
        return [_by_template(row, prompt, answer) for row in rows]
    form = _form(rows[0])
    return [_of_form(row, form) for row in rows]


def columns_of(template: str, key: str) -> list[str]:
    """The columns that a template names.

    Raises:
        UsageError: its braces do not match, or ask for more than a column.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UsageError(f"{key}={template}: {error}; a brace of the text is {{{{") from None
    columns = [name for _, name, _, _ in parts if name is not None]
    wrong = [c for c in columns if not c.isidentifier()]
    if wrong:
        raise UsageError(f"{key}={template}: {{{wrong[0]}}} is no name of a column")
    return columns


def _form(row: Row) -> str:
    for name, (needed, _) in FORMS.items():
        if all(key in row.fields for key in needed):
            return name
    forms = "; ".join(", ".join(needed) for needed, _ in FORMS.values())
    raise UsageError(
        f"{row.place}: has {_keys(row)}, and none of {forms}; name the columns in stream.prompt "
        "and stream.answer, such as '{question}'"
    )


def _keys(row: Row) -> str:
    return ", ".join(map(str, row.fields)) or "no keys"


def _of_form(row: Row, form: str) -> Conversation:
    needed, more = FORMS[form]
    absent = [key for key in needed if key not in row.fields]
    if absent:
        raise UsageError(
            f"{row.place}: lacks {', '.join(absent)} (it has {_keys(row)}), but this file began "
            f"with rows of {', '.join(needed)}; give all its rows one form"
        )
    choices = _choices(row)
    if form == "messages":
        return Conversation(row.place, _messages(row), choices)
    first, last = (_text(row, key) for key in needed)
    extra = [_text(row, key) for key in more if not is_missing(row.fields.get(key))]
    asked = "\n\n".join([first, *(text for text in extra if text.strip())])
    return _pair(row, asked, last, choices)


def _pair(row: Row, asked: str, answer: str, choices: Sequence[str]) -> Conversation:
    if not answer.strip():
        raise UsageError(f"{row.place}: its answer is empty, so there is nothing to learn")
    if choices and answer not in choices:
        raise UsageError(f"{row.place}: its answer {answer!r} is none of its choices")
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return Conversation(row.place, messages, choices, plain=True)


def _by_template(row: Row, prompt: str, answer: str) -> Conversation:
    for template in (prompt, answer):
        for column in columns_of(template, "template"):
            if column not in row.fields:
                raise UsageError(
                    f"{row.place}: has no column {column!r}, which {template!r} names; there are "
                    f"{_keys(row)}"
                )
            if is_missing(row.fields[column]):
                raise UsageError(f"{row.place}: {column} is {row.fields[column]}; write a text")
    return _pair(row, prompt.format(**row.fields), answer.format(**row.fields), _choices(row))


def _text(row: Row, key: str) -> str:
    value = row.fields[key]
    if not isinstance(value, str):
        raise UsageError(
            f"{row.place}: {key} is {_shown(value)}, not a text; name columns of other kinds in "
            "stream.prompt and stream.answer"
        )
    return value


def _choices(row: Row) -> tuple[str, ...]:
    found = row.fields.get("choices")
    if found is None:
        return ()
    texts = isinstance(found, list) and all(isinstance(c, str) and c.strip() for c in found)
    if not texts or len(set(found)) < max(2, len(found)):
        raise UsageError(f"{row.place}: choices is {_shown(found)}; give two texts or more")
    return tuple(found)


def _messages(row: Row) -> list[Message]:
    given = row.fields["messages"]
    if not isinstance(given, list) or not given:
        raise UsageError(f"{row.place}: messages is {_shown(given)}, not a list of turns")
    found = []
    for turn, message in enumerate(given, 1):
        where = f"{row.place}: turn {turn}"
        if not isinstance(message, Mapping):
            raise UsageError(f"{where} is {_shown(message)}; write {{role, content}}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise UsageError(f"{where}: {key} is {_shown(message.get(key))}, not a text")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise UsageError(f"{where}: there is no role {role!r}; use {', '.join(ROLES)}")
        if role == "assistant" and not content.strip():
            raise UsageError(f"{where}: its answer is empty, so there is nothing to learn")
        found.append({"role": role, "content": content})
    if found[-1]["role"] != "assistant":
        raise UsageError(
            f"{row.place}: ends with a turn of {found[-1]['role']!r}; the last one must be the "
            "assistant's, which is learned"
        )
    return found


def _shown(value: Any) -> str:
    if is_missing(value):
        return "missing" if value is None else str(value)
    return type(value).__name__ if not isinstance(value, list) or value else "empty"
