"""From a conversation to tokens and labels: what the model reads, and what it learns to say.

A chat template writes a whole conversation. What of it the model says is found by rendering
prefixes: an assistant's turn stands between the conversation before it, with the prompt to go on
(``add_generation_prompt``), and the conversation with it. Its labels end with the token that ends a
turn, at which generation stops; what the template puts behind that is never said by a model.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from cl_bench.contracts.errors import UsageError
from cl_bench.tasks.conversations.forms import Conversation, Message
from cl_bench.tasks.text import tokenising
from cl_bench.tasks.text.codec import PretrainedCodec

Turns = Literal["all", "last"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""For tokenizers that bring no template: ``chat_template=chatml``."""

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template marks what a model says, for transformers."""

CHECKED = 8
"""Conversations of a task whose labels are compared with a template's own marks."""


@dataclass(frozen=True)
class Rendered:
    """A sample in tokens.

    Attributes:
        text: all that stands before the answer.
        prompt: its tokens.
        earlier: whether each of them is learned too.
        lead: what the template puts before the answer's own words, such as an empty thought.
        answer: tokens of the answer, the one that ends it last.
    """

    text: str
    prompt: Sequence[int]
    earlier: Sequence[bool]
    lead: str
    answer: Sequence[int]


class ChatCodec(PretrainedCodec):
    """A tokenizer with a chat template.

    Args:
        tokenizer: of transformers.
        name: what the configuration calls it.
        template: of the conversation: None for the tokenizer's own, ``chatml``, or a file with one;
            ``none`` for plain prompts with answers.
        options: further variables of the template, such as ``{enable_thinking: false}``.

    Attributes:
        template: the text of the template; None where there is none.
        end: the token that ends an assistant's turn.

    Raises:
        UsageError: there is no such template, or it cannot write a conversation.
    """

    def __init__(
        self, tokenizer: Any, name: str, template: str | None, options: Mapping[str, Any]
    ) -> None:
        super().__init__(tokenizer, name)
        self.template = _template(tokenizer, template)
        self._options = dict(options)
        self._asked = template
        if self.template is None and options:
            raise UsageError(
                f"stream.chat_options={json.dumps(self._options)}: there is no chat template that "
                "reads them; leave them out, or name one, stream.chat_template=..."
            )
        if self.template is not None:
            self.end = self._end_of_turn()

    def identity(self) -> list[Any]:
        """All that labels depend on beside the rows."""
        return [self.name, self.template, self._options, self.end]

    def _write(self, messages: Sequence[Message], go_on: bool = False) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(messages),
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=go_on,
            **self._options,
        )
        return text

    def _end_of_turn(self) -> int:
        asked = [{"role": "user", "content": "a"}]
        told = [*asked, {"role": "assistant", "content": "b"}]
        try:
            before, whole = self._write(asked, go_on=True), self._write(told)
        except Exception as error:  # whatever a template raises
            raise UsageError(
                f"stream.chat_template={self._asked or 'null'}: cannot write a question with its "
                f"answer ({_first_line(error)}); name another, stream.chat_template=<file>"
            ) from None
        rest = whole[len(before) :].rpartition("b")[2]
        special = set(self.tokenizer.all_special_ids)
        return next(
            (t for t in self._ids(rest, add_special_tokens=False) if t in special), self.end
        )

    def render_all(self, rows: Sequence[Conversation], turns: Turns) -> list[list[Rendered]]:
        """The samples of every conversation; of many, kept for the next time.

        Raises:
            UsageError: as :meth:`render` does.
        """
        if self.content is None or len(rows) < tokenising.LEAST:
            return [self.render(row, turns) for row in rows]
        import datasets

        numbers, text = [datasets.Value("int32")], datasets.Value("string")
        columns = {"text": text, "prompt": numbers, "earlier": [datasets.Value("bool")]}
        features = {"samples": [{**columns, "lead": text, "answer": numbers}]}
        told = [[[dict(m) for m in row.messages], row.plain] for row in rows]
        kept = tokenising.tokenised(
            len(rows),
            lambda i: {"samples": [vars(one) for one in self.render(rows[i], turns)]},
            features,
            [self.content, self.identity(), turns, told],
        )
        return [[Rendered(**one) for one in samples] for samples in kept["samples"]]

    def render(self, row: Conversation, turns: Turns) -> list[Rendered]:
        """The samples that a conversation makes: one, or one an answer.

        Where a template writes old turns otherwise than new ones (Qwen3 leaves old thoughts out),
        no one text holds what the model would say at each turn, so every answer is a sample.

        Raises:
            UsageError: the template refuses the conversation, or begins an answer in another way
                than it asks for one.
        """
        if self.template is None:
            return [self._plain(row)]
        own = [i for i, m in enumerate(row.messages) if m["role"] == "assistant"]
        try:
            if turns == "last" or len(own) == 1:
                return [self._single(row.messages, row.place)]
            joined = self._joined(row.messages, own)
            if joined is not None:
                return [joined]
            return [self._single(row.messages[: i + 1], row.place) for i in own]
        except UsageError:
            raise
        except Exception as error:  # a template is a program, and raises what it likes
            raise UsageError(
                f"{row.place}: the chat template refuses it ({_first_line(error)}); correct the "
                "row, or name another template, stream.chat_template=<file>"
            ) from None

    def _plain(self, row: Conversation) -> Rendered:
        if not row.plain:
            raise UsageError(
                f"{row.place}: turns of a conversation, but tokenizer {self.name} has no chat "
                "template; name one: stream.chat_template=chatml, or a file"
            )
        prompt = self.encode(row.asked, opening=True)
        answer = [*self.encode(row.answer), self.end]
        return Rendered(row.asked, prompt, [False] * len(prompt), "", answer)

    def _single(self, messages: Sequence[Message], place: str) -> Rendered:
        before, whole = self._write(messages[:-1], go_on=True), self._write(messages)
        if not whole.startswith(before):
            at = next(
                (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b),
                min(len(before), len(whole)),
            )
            raise UsageError(
                f"{place}: the chat template asks for an answer with {before[at:][:40]!r}, but "
                f"writes one with {whole[at:][:40]!r}; set what it reads in stream.chat_options, "
                "or name another, stream.chat_template=<file>"
            )
        prompt, rest = self._pieces([before, whole[len(before) :]])
        answer, _ = self._said(rest)
        lead = _lead(whole[len(before) :], messages[-1]["content"])
        return Rendered(before, prompt, [False] * len(prompt), lead, answer)

    def _joined(self, messages: Sequence[Message], own: Sequence[int]) -> Rendered | None:
        """One sample with all answers; None where no text holds them as they would be said."""
        whole = self._write(messages)
        edges = [0]
        for i in own:
            before, until = self._write(messages[:i], go_on=True), self._write(messages[: i + 1])
            if not (whole.startswith(until) and until.startswith(before)):
                return None
            edges += [len(before), len(until)]
        pieces = self._pieces([whole[a:b] for a, b in pairwise(edges)])
        prompt: list[int] = []
        earlier: list[bool] = []
        for asked, told in zip(pieces[:-2:2], pieces[1:-2:2], strict=True):
            said, rest = self._said(told, append=False)
            prompt += [*asked, *said, *rest]
            earlier += [False] * len(asked) + [True] * len(said) + [False] * len(rest)
        prompt += pieces[-2]
        earlier += [False] * len(pieces[-2])
        lead = _lead(whole[edges[-2] :], messages[-1]["content"])
        return Rendered(whole[: edges[-2]], prompt, earlier, lead, self._said(pieces[-1])[0])

    def _said(self, tokens: Sequence[int], append: bool = True) -> tuple[list[int], list[int]]:
        """What of an answer's tokens the model says, its end included, and what follows."""
        if self.end in tokens:
            place = tokens.index(self.end) + 1
            return list(tokens[:place]), list(tokens[place:])
        return [*tokens, *([self.end] if append else [])], []

    def _pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of consecutive texts: of the whole, where each beginning has just its tokens.

        A template writes what stands before a text (``<bos>``), so that nothing is added.
        """
        whole = self._ids("".join(texts), add_special_tokens=False)
        edges = [0]
        for i in range(1, len(texts)):
            begun = self._ids("".join(texts[:i]), add_special_tokens=False)
            if whole[: len(begun)] != begun:
                return [self._ids(text, add_special_tokens=False) for text in texts]
            edges.append(len(begun))
        edges.append(len(whole))
        return [whole[a:b] for a, b in pairwise(edges)]

    def check_marks(self, row: Conversation) -> None:
        """Compare the labels of a conversation with a template's own marks, where it has some.

        Raises:
            UsageError: they name other tokens, the ends of turns and what follows them aside.
        """
        marks = self.template is not None and MARKS.search(self.template)
        if not marks or not self.tokenizer.is_fast:
            return
        found = self.render(row, "all")
        if len(found) > 1:
            return
        marked = self.tokenizer.apply_chat_template(
            list(row.messages),
            chat_template=self.template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **self._options,
        )
        one = found[0]
        tokens = [*one.prompt, *one.answer]
        ours = [*one.earlier, *[True] * len(one.answer)]
        theirs = [bool(m) for m in marked["assistant_masks"][: len(tokens)]]
        for place, (token, a, b) in enumerate(zip(tokens, ours, theirs, strict=False)):
            behind = place > 0 and not a and ours[place - 1]  # the template's own line break
            if a != b and token != self.end and not behind:
                said = self.tokenizer.decode([token])
                raise UsageError(
                    f"{row.place}: the chat template marks generations otherwise than it writes "
                    f"them, at {said!r}; correct its marks, or name another template, "
                    "stream.chat_template=<file>"
                )

    def opening(self, tokens: Sequence[int]) -> int:
        """How many tokens at the start of a prompt stand before every text."""
        first = getattr(self.tokenizer, "bos_token_id", None)
        return int(bool(tokens) and first is not None and tokens[0] == first)


def _lead(piece: str, content: str) -> str:
    return piece.partition(content.strip())[0] if content.strip() in piece else ""


def _template(tokenizer: Any, asked: str | None) -> str | None:
    if asked == "none":
        return None
    if asked == "chatml":
        return CHATML
    if asked is not None:
        try:
            return Path(asked).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"stream.chat_template={asked}: cannot be read ({error}); name a file with a "
                "template, chatml, or none"
            ) from None
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):
        own = own.get("default")
    return own if isinstance(own, str) else None


def _first_line(error: Exception) -> str:
    said = str(error).strip() or type(error).__name__
    return said.partition("\n")[0][:200]
