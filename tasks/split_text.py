"""Any labelled texts, some classes a task, for networks that tell classes apart."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from cl_bench.contracts.options import Count, PartShare
from cl_bench.contracts.stream import Data, Origin, Scenario, Stream, Task
from cl_bench.contracts.task import Batch, Side, Stored
from cl_bench.data import MemoryData
from cl_bench.tasks.arguments import ClassOrder, HeldOut, OrderSeed, require
from cl_bench.tasks.images.arrange import Holdout
from cl_bench.tasks.images.increments import first_of_each, increments, ordered
from cl_bench.tasks.text.source import StoredTexts, TextSource, load_texts
from cl_bench.tasks.text.tokens import Tokens, load_tokens


class Tokenized:
    """Token ids of all texts of a side, made when they are first asked for.

    Args:
        stored: the texts.
        tokens: the tokenizer.
        length: of every row.
    """

    def __init__(self, stored: StoredTexts, tokens: Tokens, length: int) -> None:
        self.stored = stored
        self._tokens = tokens
        self._length = length

    @cached_property
    def ids(self) -> Tensor:
        """int64 (texts, length)."""
        return self._tokens(self.stored.texts, self._length)


class TextClassTask(Task):
    """Some classes of labelled texts: ``x`` int64 (n, length), ``y`` int64 (n,).

    Args:
        name: unique within the stream.
        index: position in the stream.
        head: which output head serves it.
        classes: its positions in the stream's label space.
        class_names: of them.
        origin: licence, source, citation.
        sides: for every side the texts, which of them, and what else a batch holds.
    """

    def __init__(
        self,
        name: str,
        index: int,
        head: int,
        classes: range,
        class_names: Sequence[str],
        origin: Origin,
        sides: dict[Side, tuple[Tokenized, Tensor, Batch]],
    ) -> None:
        self.name, self.index, self.head, self.classes = name, index, head, classes
        self.facts = {"class_names": list(class_names)}
        self.origin = origin
        self._sides = sides

    def _data(self, side: Side) -> MemoryData:
        texts, rows, labels = self._sides[side]
        return MemoryData({"x": texts.ids[rows], **labels})

    @cached_property
    def train(self) -> Data:
        """Training data, kept once made."""
        return self._data("train")

    @cached_property
    def validation(self) -> Data:
        """Held-out training data; may be empty."""
        return self._data("validation")

    @cached_property
    def test(self) -> Data:
        """Test data, kept once made."""
        return self._data("test")

    def stored(self, side: Side) -> Stored:
        """The texts of a side as they are stored."""
        texts, rows, labels = self._sides[side]
        return Stored(texts.stored, rows, labels)


class SplitText(Stream):
    """Labelled texts, some classes a task.

    Args:
        dataset: hub id, ``org/name``; used where ``data_dir`` is None.
        data_dir: folder with parquet files or JSON lines (``.jsonl``, ``.jsonl.gz``).
        train: pattern of the names of the training files; on the hub, name of the split.
        test: the same of test data; None takes ``test_fraction`` out of the training rows.
        test_fraction: share of every class's rows, where ``test`` is None.
        split_seed: decides which rows are test data, where ``test`` is None.
        text_column: name of the column with the texts.
        label_column: name of the column with the labels: numbers or text.
        tokenizer: ``bytes``, a folder or a hub id; a pre-trained network needs its own. A
            ``+backbone`` brings its own, and this one is not used.
        length: tokens of a text, special ones included; what is longer loses its end.
        num_tasks: how many; None for as many as ``classes_per_task`` makes.
        classes_per_task: how many classes each, the first task apart; None to divide evenly.
        first_classes: of the first task; None for as many as the others.
        scenario: ``class`` (a head each, task id unknown), ``task`` (known) or ``domain``.
        class_order: ``fixed`` (labels in their order), ``random``, or ``seed_1993`` (100 or 200).
        order_seed: of the random order of classes and of a random validation split.
        validation_fraction: share of each task's training data held out.
        validation_split: hold out the ``first`` or ``random`` rows of each task.
        train_per_class: the first so many training rows of every class; None for all.
        test_per_class: the same of test rows.
        licence: of the data, for the record.
        citation: of the data, for the record.

    Raises:
        UsageError: if an argument is out of range, or data is missing or not of this form.
    """

    input_dtype = torch.int64

    def __init__(
        self,
        dataset: str | None = None,
        data_dir: str | None = None,
        train: str = "train*",
        test: str | None = "test*",
        test_fraction: PartShare = 0.2,
        split_seed: OrderSeed = 0,
        text_column: str = "text",
        label_column: str = "label",
        tokenizer: str = "bytes",
        length: Count = 128,
        num_tasks: Count | None = None,
        classes_per_task: Count | None = 2,
        first_classes: Count | None = None,
        scenario: Scenario = "class",
        class_order: ClassOrder = "fixed",
        order_seed: OrderSeed = 0,
        validation_fraction: PartShare = 0.1,
        validation_split: HeldOut = "random",
        train_per_class: Count | None = None,
        test_per_class: Count | None = None,
        licence: str = "unknown: see the source",
        citation: str = "unknown: see the source",
    ) -> None:
        if data_dir is not None:
            require(dataset is None, "dataset", dataset, "data_dir is used instead: set one")
        source = load_texts(
            dataset,
            data_dir,
            (train, test),
            (text_column, label_column),
            test_fraction,
            split_seed,
            licence,
            citation,
        )
        tokens = load_tokens(tokenizer, "stream.tokenizer")
        count = len(source.class_names)
        sizes = increments(count, num_tasks, classes_per_task, first_classes)
        remedy = f"tasks have {sizes} classes; domain wants equal sizes above 1, task above 1"
        fits = len(set(sizes)) == 1 or scenario != "domain"
        require(fits and (1 not in sizes or scenario == "class"), "scenario", scenario, remedy)
        order = ordered(count, "class_order", class_order, order_seed)
        holdout = Holdout(
            validation_fraction, validation_split, order_seed, train_per_class, test_per_class
        )
        sides = tuple(Tokenized(s, tokens, length) for s in (source.train, source.test))
        tasks, start = [], 0
        for index, size in enumerate(sizes):
            labels = order[start : start + size]
            first = 0 if scenario == "domain" else start
            tasks.append(_task(source, sides, index, labels, first, scenario, holdout))
            start += size
        parts = (source.fingerprint, tokens.identity, str(length))
        super().__init__(
            "split_text", tasks, scenario, (length,), "-".join(parts), modality="tokens"
        )


def _task(
    source: TextSource,
    sides: tuple[Tokenized, ...],
    index: int,
    labels: list[int],
    first: int,
    scenario: Scenario,
    holdout: Holdout,
) -> TextClassTask:
    classes = range(first, first + len(labels))
    position = torch.full((len(source.class_names),), -1)
    position[labels] = torch.tensor(classes)
    train_y, test_y = position[source.train_labels], position[source.test_labels]
    rows, held = holdout.carve(first_of_each(train_y, holdout.train_per_class))
    tested = first_of_each(test_y, holdout.test_per_class)
    names = [source.class_names[label] for label in labels]
    name = "+".join(names) if len(names) <= 2 else f"split_{index}"
    for y, which, what in ((train_y, rows, "training"), (test_y, tested, "test")):
        lacking = [n for n, c in zip(names, classes, strict=True) if not (y[which] == c).any()]
        require(not lacking, "label_column", lacking, f"classes without {what} rows")

    def side(texts: Tokenized, which: Tensor, y: Tensor) -> tuple[Tokenized, Tensor, Batch]:
        told = {"task": torch.full_like(which, index)} if scenario == "task" else {}
        return texts, which, {"y": y[which], **told}

    return TextClassTask(
        name,
        index,
        0 if scenario == "domain" else index,
        classes,
        names,
        source.origin,
        {
            "train": side(sides[0], rows, train_y),
            "validation": side(sides[0], held, train_y),
            "test": side(sides[1], tested, test_y),
        },
    )
