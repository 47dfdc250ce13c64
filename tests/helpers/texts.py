"""Tiny prompts with answers, and tiny random models that learn them."""

import functools

import torch
from torch.optim import AdamW
from toys import ORIGIN

from cl_bench.contracts import Origin
from cl_bench.learners import language
from cl_bench.models import gpt, t5
from cl_bench.tasks.text import Example, Prompt, TextStream, TextTask

FAMILIES = ("t5", "gpt2", "gpt_neox")

TEXTS = {
    "colour": [("the sky is up", "blue"), ("grass", "green"), ("a rose grows there", "red")],
    "size": [("an ant", "small"), ("a house on a hill by the sea", "very large")],
}


def make_stream(length=48, answer=16, tokenizer="bytes", task_tag=False):
    prompt = Prompt("text", task_tag)
    tasks = []
    for index, (name, rows) in enumerate(TEXTS.items()):
        labels = [label for _, label in rows]
        made = [Example(text, prompt(text, "TC", name, labels), label) for text, label in rows]
        splits = {"train": made * 3, "validation": made[:1], "test": made}
        origin = Origin("made up", "none", "none")
        tasks.append(TextTask(name, index, splits, labels, "exact_match", origin))
    return TextStream("toy", tasks, tokenizer, length, answer, task_tag)


def prompts(tokenizer="bytes", tasks=2):
    """Little stories about digits; a byte a token."""

    def examples(t, split):
        return [Example(f"{t}{i}", f"say {i} {split}{t}", f"{i * (t + 1)}") for i in range(24)]

    splits = ("train", "validation", "test")
    made = [
        TextTask(f"t{t}", t, {s: examples(t, s) for s in splits}, (), "exact_match", ORIGIN)
        for t in range(tasks)
    ]
    return TextStream("stories", made, tokenizer, 24, 6, True)


def make_learner(family="t5", stream=None, optimizer=None, tied=False, **options):
    stream = stream or make_stream()
    torch.manual_seed(1)
    size = len(stream.vocabulary)
    if family == "t5":
        model = t5(size, depth=2, width=16, heads=2, feed_forward=32, tied=tied)
    else:
        model = gpt(size, family, depth=2, width=16, heads=2, context=80, tied=tied)
    factory = optimizer or functools.partial(AdamW, lr=3e-3)
    return language(stream, model, factory, batch_size=4, seed=0, **options)


def whole(data):
    return data[torch.arange(len(data))]


def one(batch, i):
    return {name: value[i : i + 1] for name, value in batch.items()}
