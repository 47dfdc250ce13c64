"""Streams of texts with short answers: prompts, metrics, tokenizers, and where the files are."""

from tasks.text.prompt import Prompt
from tasks.text.stream import TextStream
from tasks.text.task import Example, TextTask

__all__ = ["Example", "Prompt", "TextStream", "TextTask"]
