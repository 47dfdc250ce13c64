"""Your own data: files, folders or hub data sets, one a task, for a language model to learn."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch

from cl_bench.contracts.checking import check
from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.options import Count, PartShare, Range, known, shown
from cl_bench.contracts.randomness import generator
from cl_bench.contracts.stream import Origin
from cl_bench.metrics.answers import metric_named
from cl_bench.tasks.arguments import OrderSeed, require
from cl_bench.tasks.conversations.forms import Conversation, conversations
from cl_bench.tasks.conversations.rendering import CHECKED, ChatCodec, Turns
from cl_bench.tasks.conversations.rows import SUFFIXES, Row, given_rows, read_rows
from cl_bench.tasks.conversations.task import ChatExample, ChatTask, Cutter
from cl_bench.tasks.text.codec import load_tokenizer
from cl_bench.tasks.text.stream import TextStream
from cl_bench.tasks.text.task import Split

MOST_CHOICES = 100
"""Different answers of a task's training rows that are taken for its choices, at most."""

Length = Annotated[int, Range(least=8)]


@dataclass(frozen=True)
class Source:
    """Where one task's rows are, and what is different about it.

    Attributes:
        path: a file, a folder or a hub id; None where ``rows`` are given.
        rows: rows in Python, a list of mappings or a data set of the package datasets.
        name: of the task; None for the name of the file.
        config: name of a configuration on the hub.
        split: whose rows are learned, of a folder or a hub data set.
        validation: a file of rows that are held out; None takes them out of the others.
        test: a file of rows that are scored; likewise.
        epochs: how long it is learned; None leaves it to the Trainer.
        metric: of this task.
        max_length: of this task.
        limit: most training rows.
        prompt: template over the columns.
        answer: likewise.
        choices: the answers that are allowed.
    """

    path: str | None = None
    rows: Any = None
    name: str | None = None
    config: str | None = None
    split: str | None = None
    validation: str | None = None
    test: str | None = None
    epochs: Count | None = None
    metric: Any = None
    max_length: Length | None = None
    limit: Count | None = None
    prompt: str | None = None
    answer: str | None = None
    choices: Sequence[str] | None = None


class Chat(TextStream):
    """Conversations, prompts with completions, or instructions; one source a task.

    Args:
        data: a path, a hub id or the options of :class:`Source`, for every task in order.
        tokenizer: ``bytes``, a folder or a hub id; a pretrained model needs its own.
        chat_template: None for the tokenizer's own; ``chatml``, a file, or ``none``: prompts and
            answers as they are.
        chat_options: further variables of the template, such as ``{enable_thinking: false}``.
        turns: which answers of a conversation are learned: ``all`` or the ``last``, which is the
            one that is scored.
        prompt: template over the columns of rows, such as ``"{question}"``; None where rows have
            ``messages``, ``prompt`` and ``completion``, or ``instruction`` and ``output``.
        answer: the same of what is learned.
        metric: how an answer is scored, by name, or a function of yours.
        max_length: tokens of a prompt with its answer; a longer one loses the beginning of its
            prompt, after the token that begins every text.
        limit: most training rows of a task.
        test_fraction: share of a task's rows that is scored, where it brings none for that.
        validation_fraction: the same of rows that are held out; 0 for none.
        split_seed: decides which.
        licence: of the data, for the record.
        citation: of the data, for the record.

    Raises:
        UsageError: an argument is out of range, there is no such data, or a row cannot be learned.
    """

    def __init__(
        self,
        data: Any = None,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        chat_options: Mapping[str, Any] | None = None,
        turns: Turns = "all",
        prompt: str | None = None,
        answer: str | None = None,
        metric: Any = "test_loss",
        max_length: Length = 1024,
        limit: Count | None = None,
        test_fraction: Annotated[float, Range(above=0, below=1)] = 0.1,
        validation_fraction: PartShare = 0.05,
        split_seed: OrderSeed = 0,
        licence: str = "not stated",
        citation: str = "not stated",
    ) -> None:
        sources = _sources(data, metric, max_length, limit, prompt, answer)
        remedy = "name the pretrained model too, model.name_or_path=..., or use bytes"
        require(tokenizer is not None, "tokenizer", tokenizer, remedy)
        assert tokenizer is not None
        codec = ChatCodec(load_tokenizer(tokenizer), tokenizer, chat_template, chat_options or {})
        self._chat = codec
        self._shares = (test_fraction, validation_fraction)
        self._seed = split_seed
        self._turns: Turns = turns
        tasks = [self._task(i, source, (licence, citation)) for i, source in enumerate(sources)]
        prompts = [len(e.tokens.prompt) for t in tasks for p in t.splits.values() for e in p]
        self.teaches_prompts = any(any(e.tokens.earlier) for t in tasks for e in t.splits["train"])
        for task in tasks:
            task.earlier = self.teaches_prompts
            task.longest = max(task.longest, *(len(c) for c in _written(task, codec)))
        super().__init__(
            "chat",
            tasks,
            codec,
            max(8, *prompts) + len(codec.closing),
            max(task.longest for task in tasks),
            False,
        )
        whole = json.dumps(
            [self.fingerprint, codec.identity(), turns, [s.max_length for s in sources]]
        )
        self.fingerprint = hashlib.sha256(whole.encode()).hexdigest()
        self.facts = {
            "tokenizer": tokenizer,
            "chat_template": chat_template,
            "chat_options": dict(chat_options or {}),
        }
        self.remarks = [
            f"{task.name}: {n} of {task.told['samples']} samples lost the beginning of their prompt"
            f" (stream.max_length={source.max_length})"
            for task, source in zip(tasks, sources, strict=True)
            if (n := task.told["truncated"])
        ]

    def _task(self, index: int, source: Source, terms: tuple[str, str]) -> ChatTask:
        key = f"stream.data[{index}]."
        name = _name(source, index)
        parts = {side: self._rows(rows, source, key) for side, rows in _read(source, key).items()}
        train, validation, test = self._sides(parts, name)
        if source.limit is not None:
            kept = torch.randperm(len(train), generator=generator(self._seed, "limit", name))
            train = [train[i] for i in sorted(kept[: source.limit].tolist())]
        for row in train[:CHECKED]:
            self._chat.check_marks(row)
        assert source.max_length is not None
        cutter = Cutter(self._chat, self._turns, source.max_length, "stream.max_length")
        splits: dict[Split, list[ChatExample]] = {
            "train": cutter(train, True),
            "validation": cutter(validation, False),
            "test": cutter(test, False),
        }
        choices = _choices(source, train, test, key)
        origin = Origin(source.path or "rows given in Python", *terms)
        told = {
            "samples": sum(map(len, splits.values())),
            "truncated": cutter.cut,
            "max_length": source.max_length,
        }
        return ChatTask(name, index, splits, choices, source.metric, origin, source.epochs, told)

    @staticmethod
    def _rows(rows: Sequence[Row], source: Source, key: str) -> list[Conversation]:
        return conversations(rows, source.prompt, source.answer, key)

    def _sides(
        self, parts: Mapping[str, list[Conversation]], name: str
    ) -> tuple[list[Conversation], list[Conversation], list[Conversation]]:
        """Rows that are learned, held out and scored."""
        rows, sides = parts["train"], dict(parts)
        for side, share in zip(("test", "validation"), self._shares, strict=True):
            if side in sides:
                continue
            order = torch.randperm(len(rows), generator=generator(self._seed, side, name)).tolist()
            count = max(1, round(share * len(rows))) if share else 0
            held = set(order[:count])
            sides[side] = [row for i, row in enumerate(rows) if i in held]
            rows = [row for i, row in enumerate(rows) if i not in held]
        if not rows:
            raise UsageError(
                f"{parts['train'][0].place}: too few rows for training, validation and test data; "
                "give more, or files for each (validation: ..., test: ...)"
            )
        return rows, sides["validation"], sides["test"]

    def _example(self, example: int) -> tuple[ChatTask, ChatExample]:
        task, found = self._find(example)
        assert isinstance(task, ChatTask)
        assert isinstance(found, ChatExample)
        return task, found

    def options(self, example: int) -> Sequence[str]:
        """The answers that are allowed: the sample's own, or its task's; may be none."""
        task, found = self._example(example)
        return found.choices or task.labels

    def limit(self, example: int) -> int:
        """Tokens of the longest answer of the example's task."""
        return self._example(example)[0].longest

    def answer_tokens(self, example: int, answer: str) -> list[int]:
        """What the template has the model say for an answer."""
        return [*self.codec.encode(self._example(example)[1].tokens.lead + answer), self.end]

    def grade(self, example: int, answer: str) -> float:
        """Score of an answer, without what the template puts before it."""
        lead = self._example(example)[1].tokens.lead.strip()
        return super().grade(example, answer.strip().removeprefix(lead).strip())


def _sources(
    data: Any,
    metric: Any,
    max_length: int,
    limit: int | None,
    prompt: str | None,
    answer: str | None,
) -> list[Source]:
    remedy = "list a file, a folder or a hub id for every task: 'stream.data=[a.jsonl,b.jsonl]'"
    given = [data] if isinstance(data, str | Mapping) else data
    require(isinstance(given, list | tuple) and len(given) > 0, "data", data, remedy)
    metric_named(metric, "stream.metric")
    found = []
    for i, one in enumerate(given):
        key = f"data[{i}]"
        require(isinstance(one, str | Mapping), key, one, "a path, or {path: ..., ...}")
        options = {"path": one} if isinstance(one, str) else dict(one)
        names = [field.name for field in fields(Source)]
        for option in options:
            hint = known(str(option), names)
            there = ", ".join(n for n in names if n != "rows")
            require(option in names, f"{key}.{option}", options[option], f"no option.{hint} There "
                    f"are {there}")  # fmt: skip
        checked = check(Source, options, f"stream.{key}.")
        both = (checked.get("path") is None) == (checked.get("rows") is None)
        require(not both, f"{key}.path", checked.get("path"), "name a file, a folder or a hub id")
        own = {"metric": metric, "max_length": max_length, "limit": limit}
        if checked.get("prompt") is None and checked.get("answer") is None:
            own |= {"prompt": prompt, "answer": answer}
        filled = {k: v for k, v in own.items() if checked.get(k) is None}
        source = Source(**{**checked, **filled})
        metric_named(source.metric, f"stream.{key}.metric")
        found.append(source)
    names = [_name(source, i) for i, source in enumerate(found)]
    twice = [n for n in names if names.count(n) > 1]
    remedy = f"two tasks are called {twice[:1]}; give each a name: {{path: ..., name: ...}}"
    require(not twice, "data", [s.path for s in found], remedy)
    return found


def _name(source: Source, index: int) -> str:
    if source.name is not None:
        return source.name
    if source.path is None:
        return f"task_{index}"
    name = Path(source.path).name
    ending = next((s for s in SUFFIXES if name.endswith(s)), "")
    return name.removesuffix(ending) or f"task_{index}"


def _read(source: Source, key: str) -> dict[str, list[Row]]:
    if source.rows is None:
        assert source.path is not None
        found = read_rows(source.path, source.config, source.split, f"{key}path")
    elif isinstance(source.rows, Mapping):
        found = {str(k): given_rows(v, f"{key}rows, {k}") for k, v in source.rows.items()}
        unknown = [k for k in found if k not in ("train", "validation", "test")]
        if unknown or "train" not in found:
            raise UsageError(
                f"{key}rows: has {', '.join(found)}; give train and, if there are any, validation "
                "and test"
            )
    else:
        found = {"train": given_rows(source.rows, f"{key}rows")}
    for side, path in (("validation", source.validation), ("test", source.test)):
        if path is not None:
            found[side] = read_rows(path, source.config, None, f"{key}{side}")["train"]
    return found


def _choices(
    source: Source, train: Sequence[Conversation], test: Sequence[Conversation], key: str
) -> Sequence[str]:
    """The answers that are allowed, where the metric asks which is the likeliest."""
    told = source.choices
    if told is None and metric_named(source.metric, "stream.metric")[1].sees != "choice":
        return ()
    if told is None:
        if all(row.choices for row in test):
            return ()
        told = sorted({row.answer for row in train})
        if not 2 <= len(told) <= MOST_CHOICES:
            raise UsageError(
                f"{key}metric={shown(source.metric)}: its training rows have {len(told)} different "
                f"answers, which are no choices (2 to {MOST_CHOICES}); list them, choices: [...], "
                "here or in every row"
            )
    wrong = next(
        (row for row in [*train, *test] if not row.choices and row.answer not in told), None
    )
    if wrong is not None:
        raise UsageError(f"{wrong.place}: its answer {wrong.answer!r} is none of {key}choices")
    return tuple(told)


def _written(task: ChatTask, codec: ChatCodec) -> Iterator[list[int]]:
    """What a model writes for every allowed answer of a task, its end included."""
    scored = task.splits["test"]
    yield [codec.end]
    for lead in {e.tokens.lead for e in scored}:
        for choice in {*task.labels, *(c for e in scored for c in e.choices)}:
            yield [*codec.encode(lead + choice), codec.end]
