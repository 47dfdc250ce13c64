"""The T5 streams: CL_Benchmark's tasks in the six published orders (Wang et al., EMNLP 2023).

Orders 1 to 3 hold four topic and sentiment tasks, orders 4 to 6 all fifteen. Scores are exact
matches of generated answers.
"""

from collections.abc import Sequence
from typing import Literal

from cl_bench.contracts.options import Count, PartShare, Seed
from cl_bench.tasks.arguments import require
from cl_bench.tasks.text.benchmark import COMPLETE, ORDERS, SOURCES, benchmark_tasks, folder_of
from cl_bench.tasks.text.codec import BYTES
from cl_bench.tasks.text.prompt import Prompt
from cl_bench.tasks.text.stream import TextStream

OFFLINE = (
    "A small stream of the same tasks runs from a part of them: "
    "+stream=t5_cl_fewshot model=t5_tiny stream.data_dir=/path/to/CL_Benchmark"
)


class T5CL(TextStream):
    """Text classification in words, one task after another.

    Args:
        data_dir: folder with the benchmark's files.
        order: 1 to 6.
        tasks: names in an order of one's own, in place of ``order``.
        complete_only: of the order, only the ten tasks that public snapshots hold both files of.
        validation_fraction: share of the training rows that is taken out for validation.
        split_seed: decides which.
        verify: refuse files whose rows are not the benchmark's own.
        prompt: lays prompts out.
        tokenizer: ``bytes``, a folder or a hub id.
        prompt_length: tokens of the longest prompt; longer ones lose their end.
        answer_length: tokens of the longest answer, its end included.

    Raises:
        UsageError: an argument is out of range, or files are missing.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        order: Literal[1, 2, 3, 4, 5, 6] = 1,
        tasks: Sequence[str] | None = None,
        complete_only: bool = False,
        validation_fraction: PartShare = 0.0,
        split_seed: Seed = 0,
        verify: bool = True,
        prompt: Prompt | None = None,
        tokenizer: str | None = BYTES,
        prompt_length: Count = 512,
        answer_length: Count = 50,
    ) -> None:
        names = ORDERS[order] if tasks is None else tuple(tasks)
        unknown = [name for name in names if name not in SOURCES]
        require(not unknown, "tasks", list(names), f"choose from {', '.join(SOURCES)}")
        require(len(set(names)) == len(names) > 0, "tasks", list(names), "each of them once")
        if complete_only:
            names = tuple(name for name in names if name in COMPLETE)
        folder = folder_of(data_dir, OFFLINE)
        prompt = prompt or Prompt()
        made = benchmark_tasks(
            names, folder, prompt, validation_fraction, split_seed, OFFLINE, verify
        )
        name = "t5_cl_long" if order > 3 else "t5_cl"
        if complete_only:
            name = "t5_cl_10of15"
        super().__init__(name, made, tokenizer, prompt_length, answer_length, prompt.task_tag)
