"""Streams of texts with short answers: prompts, metrics, tokenizers, and where the files are."""

from cl_bench.tasks.text.prompt import Prompt
from cl_bench.tasks.text.stream import TextStream
from cl_bench.tasks.text.task import Example, TextTask

__all__ = ["Example", "Prompt", "TextStream", "TextTask"]
