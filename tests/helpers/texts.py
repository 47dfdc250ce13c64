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


def make_stream(length=48, answer=16, tokenizer="bytes", task_tag=False, texts=TEXTS):
    prompt = Prompt("text", task_tag)
    tasks = []
    for index, (name, rows) in enumerate(texts.items()):
        labels = [label for _, label in rows]
        made = [Example(text, prompt(text, "TC", name, labels), label) for text, label in rows]
        splits = {"train": made * 3, "validation": made[:1], "test": made}
        origin = Origin("made up", "none", "none")
        tasks.append(TextTask(name, index, splits, labels, "exact_match", origin))
    return TextStream("toy", tasks, tokenizer, length, answer, task_tag)


def prompts(tokenizer="bytes", tasks=2, rows=24):
    """Little stories about digits; a byte a token."""

    def examples(t, split):
        return [Example(f"{t}{i}", f"say {i} {split}{t}", f"{i * (t + 1)}") for i in range(rows)]

    splits = ("train", "validation", "test")
    made = [
        TextTask(f"t{t}", t, {s: examples(t, s) for s in splits}, (), "exact_match", ORIGIN)
        for t in range(tasks)
    ]
    return TextStream("stories", made, tokenizer, 24, 6, True)


DECODERS = {
    "llama": ("LlamaConfig", {}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8},
    ),
}


def decoder(family, size):
    """Grouped queries, gated MLPs, rotary positions."""
    import transformers

    kind, more = DECODERS[family]
    config = getattr(transformers, kind)(
        vocab_size=size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=96,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        **more,
    )
    config._experts_implementation = "eager"  # others know no double precision
    return transformers.AutoModelForCausalLM.from_config(config).float()


def make_learner(family="t5", stream=None, optimizer=None, tied=False, **options):
    stream = stream or make_stream()
    torch.manual_seed(1)
    size = len(stream.vocabulary)
    if family == "t5":
        model = t5(size, depth=2, width=16, heads=2, feed_forward=32, tied=tied)
    elif family in DECODERS:
        model = decoder(family, size)
    else:
        model = gpt(size, family, depth=2, width=16, heads=2, context=80, tied=tied)
    factory = optimizer or functools.partial(AdamW, lr=3e-3)
    return language(stream, model, factory, batch_size=4, seed=0, **options)


def whole(data):
    return data[torch.arange(len(data))]


def one(batch, i):
    return {name: value[i : i + 1] for name, value in batch.items()}
