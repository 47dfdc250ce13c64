"""People, and what is written and asked about them, as tokens."""

import itertools
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

import cl_bench.tasks.biography.pools as pools
from cl_bench.contracts.language import IGNORE
from cl_bench.data import MemoryData
from cl_bench.tasks.arguments import require
from cl_bench.tasks.biography.people import draw, populate
from cl_bench.tasks.biography.templates import QUESTIONS, statements
from cl_bench.tasks.biography.vocabulary import END, HOLE, PAD, VALUE, Vocabulary, fill


class World:
    """A world of people.

    Args:
        seed: decides everything.
        count: how many people there are.
        attributes: which are talked about, and how many values each has.
        names: how many first, middle and last names there are.
        templates: sentences per attribute.
        whole_values: every value is one token.

    Raises:
        UsageError: an argument is out of range.
    """

    def __init__(
        self,
        seed: int,
        count: int,
        attributes: Mapping[str, int],
        names: tuple[int, int, int],
        templates: int,
        whole_values: bool,
    ) -> None:
        require(bool(attributes), "attributes", dict(attributes), "name at least one")
        self.seed = seed
        self.attributes = tuple(attributes)
        texts = {name: pools.values(name, size) for name, size in attributes.items()}
        name_texts = pools.names(names)
        self.people = populate(seed, count, names, pools.FULL_SIZES | dict(attributes))
        sentences = {name: statements(name, templates) for name in attributes}
        said = [t for group in (*sentences.values(), *name_texts) for t in group]
        asked = [QUESTIONS[name] for name in attributes]
        spoken = [f" {text}" for group in texts.values() for text in group]
        self.vocabulary = Vocabulary(
            [*(f" {t}" for t in said), *asked, " his her", *([] if whole_values else spoken)],
            spoken if whole_values else (),
        )
        encode = self.vocabulary.template
        self.sentences = [[encode(t) for t in sentences[name]] for name in attributes]
        self.questions = [encode(QUESTIONS[name]) for name in attributes]
        self._values = [self.vocabulary.table(texts[name]) for name in attributes]
        tables = [self.vocabulary.table(pool) for pool in name_texts]
        self._names = torch.cat([t[self.people.names[:, i]] for i, t in enumerate(tables)], 1)
        his, her = self.vocabulary.encode(" his")[0], self.vocabulary.encode(" her")[0]
        self._their = torch.where(self.people.female, her, his)

    def values(self, kind: int, people: Tensor) -> Tensor:
        """Tokens (n, v) of an attribute's values, with holes."""
        return self._values[kind][self.people.values[self.attributes[kind]][people]]

    def _filled(self, template: list[int], kind: int, people: Tensor) -> Tensor:
        return fill(template, self._names[people], self.values(kind, people), self._their[people])

    @cached_property
    def openings(self) -> Tensor:
        """What an answer of each kind can begin with, bool (kinds, vocabulary)."""
        found = torch.zeros(len(self.attributes), len(self.vocabulary), dtype=torch.bool)
        for kind, table in enumerate(self._values):
            found[kind, table[:, 0]] = True
        return found

    @cached_property
    def chance(self) -> float:
        """Exact matches of always giving the likeliest value of the asked attribute.

        Values are drawn uniformly, company cities through companies.
        """
        likeliest = []
        for name, table in zip(self.attributes, self._values, strict=True):
            if name == "company_city":
                seats = torch.bincount(self.people.seats)
                likeliest.append(float(seats.max()) / len(self.people.seats))
            else:
                likeliest.append(1 / len(table))
        return sum(likeliest) / len(likeliest)

    # -- biographies ------------------------------------------------------------------------------

    def choices(self, count: int, variants: int, key: str) -> tuple[Tensor, Tensor]:
        """Templates and orders, int64 (count, variants, attributes) both, drawn under ``key``.

        They are uniform; those of one person's variants differ, attribute by attribute. Nobody's
        depend on ``count``.
        """
        kinds, pool = len(self.attributes), len(self.sentences[0])
        keys = draw(self.seed, f"sentences {key}", count * kinds * pool, 1 << 53)
        templates = keys.view(count, kinds, pool).argsort(2)[:, :, :variants].transpose(1, 2)
        permutations = torch.tensor(list(itertools.permutations(range(kinds))))
        first = draw(self.seed, f"orders {key}", count, len(permutations))
        stride = 1 + draw(self.seed, f"strides {key}", count, len(permutations) // variants)
        code = first[:, None] + stride[:, None] * torch.arange(variants)
        return templates, permutations[code % len(permutations)]

    def biographies(self, people: Tensor, templates: Tensor, orders: Tensor) -> Tensor:
        """One document a person, its attributes in the given order.

        Args:
            people: int64 (n,).
            templates: int64 (n, attributes), the sentence for each attribute.
            orders: int64 (n, attributes), attributes in the order of mention.

        Returns:
            int64 (n, w) with holes; the last column is the end of the document.
        """
        width = max(
            len(sentence) + self._names.shape[1] + table.shape[1] - 2
            for group, table in zip(self.sentences, self._values, strict=True)
            for sentence in group
        )
        text = torch.full((len(people), len(self.attributes), width), HOLE)
        for kind, group in enumerate(self.sentences):
            for number, sentence in enumerate(group):
                rows = (templates[:, kind] == number).nonzero().squeeze(1)
                if len(rows):
                    filled = self._filled(sentence, kind, people[rows])
                    text[rows, kind, : filled.shape[1]] = filled
        text = text.gather(1, orders[:, :, None].expand_as(text)).flatten(1)
        return torch.cat([text, torch.full((len(people), 1), END)], 1)

    # -- questions --------------------------------------------------------------------------------

    def questions_about(self, people: Tensor, length: int) -> MemoryData:
        """Every question about each of ``people``, person by person, padded to ``length``."""
        end = torch.full((len(people), 1), END)
        prompts = [self._filled(q, k, people) for k, q in enumerate(self.questions)]
        answers = [torch.cat([self.values(k, people), end], 1) for k in range(len(prompts))]
        return _examples(prompts, answers, length)

    def statements_about(self, people: Tensor, length: int) -> MemoryData:
        """The beginning of a biography of each of ``people``, once for every attribute.

        A document's end comes first, then a sentence up to its value, which is what is scored.
        """
        templates = self.choices(len(self.people.female), 1, "probe")[0][people, 0]
        prompts, answers = [], []
        for kind, group in enumerate(self.sentences):
            rows = torch.full((len(people), length), HOLE)
            for number, sentence in enumerate(group):
                told = (templates[:, kind] == number).nonzero().squeeze(1)
                beginning = [END, *sentence[: sentence.index(VALUE)]]
                filled = self._filled(beginning, kind, people[told])
                rows[told, : filled.shape[1]] = filled
            prompts.append(rows)
            answers.append(self.values(kind, people))
        return _examples(prompts, answers, length)

    @cached_property
    def length(self) -> int:
        """Of the longest question with its answer, or beginning of a biography with its value."""
        name = self._names.shape[1]
        return max(
            max(len(q), *(s.index(VALUE) + 1 for s in group)) + name + table.shape[1]
            for q, group, table in zip(self.questions, self.sentences, self._values, strict=True)
        )


def _examples(prompts: list[Tensor], answers: list[Tensor], length: int) -> MemoryData:
    """Language batches' tensors from prompts and answers (n, w), with holes, of every kind."""
    inputs, labels = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        text = torch.cat([prompt, answer], 1)
        learned = torch.cat([torch.full_like(prompt, IGNORE), answer], 1)
        order = (text == HOLE).int().argsort(dim=1, stable=True)[:, :length]
        missing = length - order.shape[1]
        inputs.append(torch.nn.functional.pad(text.gather(1, order), (0, missing), value=HOLE))
        labels.append(torch.nn.functional.pad(learned.gather(1, order), (0, missing), value=HOLE))
    count, kinds = len(prompts[0]), len(prompts)
    tokens = torch.stack(inputs, 1).flatten(0, 1)
    wanted = torch.stack(labels, 1).flatten(0, 1)
    padding = tokens == HOLE
    return MemoryData(
        {
            "input_ids": tokens.masked_fill(padding, PAD),
            "labels": wanted.masked_fill(padding, IGNORE),
            "attention_mask": padding.logical_not().long(),
            "kind": torch.arange(kinds).repeat(count),
        }
    )
