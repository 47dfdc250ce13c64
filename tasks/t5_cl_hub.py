"""Orders 1 to 3 drawn anew from the hub's data sets: as many samples a class, other samples.

A different draw than CL_Benchmark's, so scores compare with published ones only roughly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.options import Count, PartShare, Seed
from cl_bench.contracts.randomness import generator
from cl_bench.contracts.stream import Origin
from cl_bench.tasks.t5_cl import OFFLINE
from cl_bench.tasks.text.benchmark import ORDERS, SOURCES, origin_of
from cl_bench.tasks.text.codec import BYTES
from cl_bench.tasks.text.prompt import Prompt
from cl_bench.tasks.text.stream import TextStream
from cl_bench.tasks.text.task import carve, text_task

Row = Mapping[str, Any]


ORIGIN = Origin(
    "data sets on the Hugging Face hub, drawn from anew",
    "see the data sets' cards",
    "see the data sets' cards",
)


@dataclass(frozen=True)
class OnHub:
    """Where a task's data is on the hub, and how a row reads.

    Attributes:
        dataset: hub id.
        text: the sample's text.
        label: column with the number of the class, in the order of the benchmark's labels.
        first: number of the first class.
        config: configuration of the data set.
    """

    dataset: str
    text: Callable[[Row], str]
    label: str
    first: int = 0
    config: str | None = None


def _titled(title: str, *columns: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        body = " ".join(str(row[c]) for c in columns if row[c])
        return f"Title: {row[title]}\nText: {body}\n"

    return text


HUB: Mapping[str, OnHub] = {
    "dbpedia": OnHub("fancyzhx/dbpedia_14", _titled("title", "content"), "label"),
    "amazon": OnHub(
        "yassiracharki/Amazon_Reviews_for_Sentiment_Analysis_fine_grained_5_classes",
        _titled("review_title", "review_text"),
        "class_index",
        first=1,
    ),
    "yahoo": OnHub(
        "community-datasets/yahoo_answers_topics",
        _titled("question_title", "question_content", "best_answer"),
        "topic",
    ),
    "agnews": OnHub("fancyzhx/ag_news", lambda row: f"Text: {row['text']}\n", "label"),
}


class HubText(TextStream):
    """Four topic and sentiment tasks, 1,000 training samples a class, from the hub.

    Args:
        order: 1, 2 or 3.
        per_class: training samples of a class.
        test_samples: of a task.
        validation_fraction: share of the training samples that is taken out.
        split_seed: decides which samples are drawn.
        prompt: lays prompts out.
        tokenizer: ``bytes``, a folder or a hub id.
        prompt_length: tokens of the longest prompt; longer ones lose their end.
        answer_length: tokens of the longest answer, its end included.

    Raises:
        UsageError: an argument is out of range, or the hub cannot be reached.
    """

    def __init__(
        self,
        order: Literal[1, 2, 3] = 1,
        per_class: Count = 1000,
        test_samples: Count = 7600,
        validation_fraction: PartShare = 0.0,
        split_seed: Seed = 0,
        prompt: Prompt | None = None,
        tokenizer: str | None = BYTES,
        prompt_length: Count = 512,
        answer_length: Count = 50,
    ) -> None:
        prompt = prompt or Prompt()
        made = []
        for index, name in enumerate(ORDERS[order]):
            source, found = SOURCES[name], HUB[name]
            train = _draw(name, "train", found, source.labels, per_class, split_seed)
            each = -(-test_samples // len(source.labels))
            test = _draw(name, "test", found, source.labels, each, split_seed)[:test_samples]
            train, validation = carve(train, name, validation_fraction, split_seed)
            origin = origin_of(name, f"{found.dataset} on the Hugging Face hub", ORIGIN)
            rows = {"train": train, "validation": validation, "test": test}
            made.append(
                text_task(name, index, rows, source.category, source.labels, prompt, origin)  # type: ignore[arg-type]
            )
        super().__init__(
            "t5_cl_hub", made, tokenizer, prompt_length, answer_length, prompt.task_tag
        )


def _draw(
    name: str, split: str, found: OnHub, labels: Sequence[str], per_class: int, seed: int
) -> list[tuple[str, str]]:
    """(text, label) of ``per_class`` rows of every class, shuffled."""
    data = _load(name, split, found)
    classes = torch.tensor(data[found.label]) - found.first
    rng = generator(seed, "hub", name, split)
    order = torch.randperm(len(classes), generator=rng)
    chosen = []
    for k in range(len(labels)):
        own = order[classes[order] == k][:per_class]
        if len(own) < per_class:
            raise UsageError(
                f"{found.dataset}: {len(own)} {split} rows of class {labels[k]!r}, "
                f"{per_class} are wanted; ask for fewer (stream.per_class, stream.test_samples)"
            )
        chosen.append(own)
    every = torch.cat(chosen)
    every = every[torch.randperm(len(every), generator=rng)]
    return [(found.text(data[i]), labels[int(classes[i])]) for i in every.tolist()]


def _load(name: str, split: str, found: OnHub) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(found.dataset, found.config, split=split)
    except Exception as error:  # what the hub raises differs by version and by what is wrong
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"task {name!r}: {found.dataset} cannot be had from the hub ({reason}). {OFFLINE}"
        ) from error
