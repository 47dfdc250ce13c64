"""Real text that a small encoder-decoder can learn from scratch on a CPU.

A task is here only because, learned alone, it beats the majority class by 15 points on three seeds
(``tests/benchmarks/language_entry.py``); NLI, paraphrase and reasoning tasks do not at this size.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch

from cl_bench.contracts.errors import UsageError
from cl_bench.contracts.options import Count, Index, Range, Seed
from cl_bench.contracts.randomness import generator
from cl_bench.tasks.arguments import require
from cl_bench.tasks.text.benchmark import SOURCES, find_files, folder_of, origin_of, read_rows
from cl_bench.tasks.text.codec import WordCodec
from cl_bench.tasks.text.prompt import Prompt
from cl_bench.tasks.text.stream import TextStream
from cl_bench.tasks.text.task import Split, text_task

FROM: Mapping[str, tuple[str, ...]] = {
    "dbpedia": ("test",),
    "agnews": ("train", "test"),
    "amazon": ("train", "test"),
    "yelp": ("train",),
}
"""The files whose rows are divided anew."""


class SmallText(TextStream):
    """Topics and sentiment from CL_Benchmark's rows, divided anew, read as words.

    All rows of a task are put together and drawn from, so scores compare with nothing published;
    of dbpedia and yelp, public snapshots hold one file.

    Args:
        data_dir: folder with the benchmark's files.
        tasks: names, in order; None for all four.
        train_samples: most training samples of a task.
        test_samples: most test samples of a task.
        validation_samples: validation samples of a task.
        samples_seen: how many samples a task is learned from, repeats counted, to the next whole
            epoch: tasks of different sizes get about as many steps. None leaves it to the Trainer.
        vocabulary: tokens; words are counted in the training samples of all four tasks.
        prompt: lays prompts out.
        prompt_length: words of the longest prompt.
        split_seed: decides which rows train and which test.

    Raises:
        UsageError: an argument is out of range, or files are missing.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        tasks: Sequence[str] | None = None,
        train_samples: Count = 6000,
        test_samples: Count = 500,
        validation_samples: Index = 200,
        samples_seen: Count | None = 27000,
        vocabulary: Annotated[int, Range(least=100)] = 8000,
        prompt: Prompt | None = None,
        prompt_length: Count = 64,
        split_seed: Seed = 0,
    ) -> None:
        names = list(FROM) if tasks is None else list(tasks)
        unknown = [name for name in names if name not in FROM]
        require(bool(names) and not unknown, "tasks", names, f"choose from {', '.join(FROM)}")
        folder = folder_of(data_dir, "")
        files = find_files(folder, [(name, split) for name in FROM for split in FROM[name]], "")
        prompt = prompt or Prompt(layout="text", task_tag=False)
        rows: dict[str, dict[Split, list[tuple[str, str]]]] = {}
        for name in FROM:
            every = [row for split in FROM[name] for row in read_rows(files[name, split])]
            order = torch.randperm(len(every), generator=generator(split_seed, name)).tolist()
            tested, held = test_samples, test_samples + validation_samples
            if held >= len(every):
                raise UsageError(
                    f"stream.test_samples={test_samples}, stream.validation_samples="
                    f"{validation_samples}: task {name!r} has {len(every)} rows in all"
                )
            cuts: dict[Split, tuple[int, int]] = {
                "test": (0, tested),
                "validation": (tested, held),
                "train": (held, held + train_samples),
            }
            rows[name] = {
                split: [every[i] for i in order[start:stop]]
                for split, (start, stop) in cuts.items()
            }
        labels = [label for name in FROM for label in SOURCES[name].labels]
        read = (text for name in FROM for text, _ in rows[name]["train"])
        codec = WordCodec(read, vocabulary, labels)
        made = [
            text_task(
                name,
                i,
                rows[name],
                SOURCES[name].category,
                SOURCES[name].labels,
                prompt,
                origin_of(name, f"{folder}, divided anew"),
            )
            for i, name in enumerate(names)
        ]
        for task in made:
            if samples_seen is not None:
                task.epochs = -(-samples_seen // len(task.splits["train"]))
        super().__init__("t5_cl_small", made, codec, prompt_length, 8, prompt.task_tag)
