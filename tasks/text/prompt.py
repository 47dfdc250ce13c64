"""From a sample's text to a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cl_bench.contracts.checking import checked

QUESTIONS = {
    "NLI": 'What is the logical relationship between the "sentence 1" and the "sentence 2"?',
    "QQP": 'Whether the "first sentence" and the "second sentence" have the same meaning?',
    "SC": "What is the sentiment of the following paragraph?",
    "TC": "What is the topic of the following paragraph?",
    "BoolQA": "According to the following passage, is the question true or false?",
    "MultiRC": "According to the following passage and question, is the candidate answer true or "
    "false?",
    "WiC": "Given a word and two sentences, whether the word is used with the same sense in both "
    "sentence?",
}
"""O-LoRA's question by category, to the letter. COPA's samples state their own."""


@checked("stream.prompt.")
@dataclass(frozen=True)
class Prompt:
    """How prompts are laid out.

    Args:
        layout: ``o_lora``: tags, question, options, the text, ``Answer:`` (Wang et al., 2023);
            ``text``: tags and the text alone, for small models that learn from scratch.
        task_tag: whether the prompt begins with the task's category and name, as in O-LoRA's
            protocol: the task is then known at test time.

    Raises:
        UsageError: an option is none of the above.
    """

    layout: Literal["o_lora", "text"] = "o_lora"
    task_tag: bool = True

    def __call__(self, text: str, category: str, name: str, labels: Sequence[str]) -> str:
        """The prompt of a sample of the task ``name``."""
        tag = f"Task:{category}\nDataset:{name}\n" if self.task_tag else ""
        if self.layout == "text":
            return f"{tag}{text}"
        question = ""
        if category in QUESTIONS:
            options = ", ".join(labels)
            question = f"{QUESTIONS[category]} Choose one from the option.\nOption: {options} \n"
        return f"{tag}{question}{text}\nAnswer:"
