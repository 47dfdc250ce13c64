"""Orders 1 to 3 in the few-shot form of LFPT5 (Qin & Joty, ICLR 2022): 16 samples a class.

Task sequence, labels and prompts are those of ``t5_cl``, the samples are not: a small stream that
is complete offline, no reproduction.
"""

from collections.abc import Mapping
from typing import Literal

from cl_bench.contracts.options import Count
from cl_bench.contracts.stream import Origin
from cl_bench.tasks.arguments import require
from cl_bench.tasks.text.benchmark import ORDERS, SOURCES, folder_of, origin_of, read_rows
from cl_bench.tasks.text.codec import BYTES
from cl_bench.tasks.text.prompt import Prompt
from cl_bench.tasks.text.stream import TextStream
from cl_bench.tasks.text.task import Split, text_task

DRAWS = ("0_42", "1_142", "2_242")

ORIGIN = Origin(
    "github.com/qcwthu/Lifelong-Fewshot-Language-Learning, commit cf7d17c",
    "MIT; the corpora keep their own terms",
    "Qin & Joty, LFPT5, ICLR 2022",
)

VERBALISERS: Mapping[str, Mapping[str, str]] = {
    "agnews": {"science": "Science or Technology"},
    "amazon": {
        "terrible": "very negative",
        "bad": "negative",
        "middle": "neutral",
        "good": "positive",
        "wonderful": "very positive",
    },
    "dbpedia": {"thlete": "Athlete"},  # their spelling
    "yahoo": {
        "society and culture": "Society & Culture",
        "science": "Science & Mathematics",
        "education and reference": "Education & Reference",
        "computers and internet": "Computers & Internet",
        "business": "Business & Finance",
        "entertainment and music": "Entertainment & Music",
        "family and relationships": "Family & Relationships",
        "politics and government": "Politics & Government",
    },
}
"""LFPT5's word for a label, where it is not the label without spaces and capitals."""


class FewShot(TextStream):
    """Four topics-and-sentiment tasks, 16 training and 100 test samples a class.

    Args:
        data_dir: folder with ``lfpt5_fewshot/``, or that folder.
        order: 1, 2 or 3, as published for the whole data.
        draw: which of the three draws of training samples: 0, 1 or 2.
        prompt: lays prompts out.
        tokenizer: ``bytes``, a folder or a hub id.
        prompt_length: tokens of the longest prompt.
        answer_length: tokens of the longest answer, its end included.

    Raises:
        UsageError: an argument is out of range, or files are missing.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        order: Literal[1, 2, 3] = 1,
        draw: Literal[0, 1, 2] = 0,
        prompt: Prompt | None = None,
        tokenizer: str | None = BYTES,
        prompt_length: Count = 512,
        answer_length: Count = 50,
    ) -> None:
        advice = "The few-shot files come with the project's shared data (cl_benchmark)."
        folder = folder_of(data_dir, advice)
        inside = folder / "lfpt5_fewshot"
        folder = inside if inside.is_dir() else folder
        names: dict[Split, str] = {"train": "train", "validation": "valid", "test": "test"}
        paths = {
            (name, split): folder / f"{name}.{DRAWS[draw]}.{word}.jsonl.gz"
            for name in ORDERS[order]
            for split, word in names.items()
        }
        missing = [path.name for path in paths.values() if not path.is_file()]
        remedy = f"missing in {folder}: {', '.join(missing)}. {advice}"
        require(not missing, "data_dir", data_dir, remedy)
        prompt = prompt or Prompt()
        tasks = []
        for index, name in enumerate(ORDERS[order]):
            source = SOURCES[name]
            words = {label.lower().replace(" ", ""): label for label in source.labels}
            words |= {label.lower(): label for label in source.labels}
            words |= VERBALISERS[name]
            rows = {
                split: [(text, words[word.lower()]) for text, word in read_rows(paths[name, split])]
                for split in names
            }
            tasks.append(
                text_task(
                    name,
                    index,
                    rows,
                    source.category,
                    source.labels,
                    prompt,
                    origin_of(name, ORIGIN.source, ORIGIN),
                )
            )
        super().__init__(
            "t5_cl_fewshot", tasks, tokenizer, prompt_length, answer_length, prompt.task_tag
        )
