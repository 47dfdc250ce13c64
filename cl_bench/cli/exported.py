"""A language model as others serve it: weights, tokenizer, chat template, generation settings.

transformers and vLLM load the folder as it is. Weights have the type in which the source keeps its
own. A change of low rank can be written as an adapter in PEFT's format instead, whichever strategy
made it: the pairs are read off the weights before and after.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cl_bench.cli.build import build
from cl_bench.cli.recorded import OBJECT, Recorded
from cl_bench.contracts import UsageError
from cl_bench.hub import hub_reachable
from cl_bench.learners.text import body_and_head
from cl_bench.tasks.conversations.rendering import ChatCodec
from cl_bench.tasks.text.codec import BYTES, PretrainedCodec, load_tokenizer
from cl_bench.tracking.files import write_atomically

NOISE = 1e-6
"""Of a weight's largest singular value: what rounding to float32 leaves in a change of it."""


class WeightsAlone(Exception):  # noqa: N818
    """Why there is nothing but the weights to write."""


def load(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights by their names.

    Raises:
        WeightsAlone: the module has others.
    """
    try:
        module.load_state_dict(dict(weights))
    except RuntimeError as error:
        said = " ".join(str(error).split())[:300]
        raise WeightsAlone(
            f"the strategy or learner has changed the network's structure ({said})"
        ) from error


def load_language(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Load a learner's weights into the model it was made from."""
    for part, start in zip(body_and_head(model), ("backbone.", "heads.0."), strict=True):
        load(part, {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)})


def write_pretrained(
    run: Recorded,
    data: Mapping[str, Any],
    model: Any,
    weights: Mapping[str, Tensor],
    folder: Path,
    target: Path,
) -> str:
    """Write a model of transformers; returns the card's section on loading.

    Args:
        run: whose weights they are.
        data: what ``data.json`` says of the stream.
        model: of that class, with any weights.
        weights: to be written.
        folder: to write to.
        target: what it will be called.
    """
    load_language(model, weights)
    dtype = _source_dtype(run)
    model.to(dtype)
    told = _write_words(run, data, model, folder)
    model.save_pretrained(folder)
    name = type(model).__name__
    words = ", AutoTokenizer" if (folder / "tokenizer_config.json").is_file() else ""
    line = f'\ntokenizer = AutoTokenizer.from_pretrained("{target.name}")' if words else ""
    return (
        "## Loading\n\n```python\n"
        f"from transformers import {name}{words}\n\n"
        f'model = {name}.from_pretrained("{target.name}")  # {_brief(dtype)}{line}\n```\n\n'
        f"{told} There is one head, over the whole vocabulary."
    )


def write_adapter(
    run: Recorded,
    data: Mapping[str, Any],
    model: Any,
    start: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    folder: Path,
) -> str:
    """Write what has changed since the start as low-rank pairs of PEFT.

    Of every matrix W the change W - W_0 = U S V^T is written as B = U sqrt(S), A = sqrt(S) V^T.

    Raises:
        UsageError: the source cannot be named, or something changed that no such pair can hold.
    """
    base = run.cfg.model.get("name_or_path")
    if base is None:
        raise UsageError(
            "adapter=true: an adapter goes with a model in a folder or on the hub, and this run "
            "began with random weights; leave it out, which writes the whole model"
        )
    load_language(model, weights)
    after = {k: v.clone() for k, v in model.state_dict().items()}
    load_language(model, start)
    pairs = _pairs(model, after)
    if not pairs:
        raise UsageError("adapter=true: no weight has changed, so there is no adapter to write")
    rank = max(len(A) for A, _ in pairs.values())
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # PEFT adds alpha / r B A
        target_modules=list(pairs),
        base_model_name_or_path=str(base),
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
    )
    wrapped: Any = get_peft_model(model, config)
    with torch.no_grad():
        for name, (A, B) in pairs.items():
            layer = wrapped.base_model.model.get_submodule(name)
            for part, matrix in ((layer.lora_A, A), (layer.lora_B, B.T)):
                weight = part["default"].weight
                weight.zero_()
                along = weight if part is layer.lora_A else weight.T
                along[: len(matrix)] = matrix
    wrapped.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's; ours follows
    told = _write_words(run, data, None, folder)
    return (
        "## Loading\n\nAn adapter of rank "
        f"{rank} for `{base}`, in float32:\n\n```python\n"
        "from peft import AutoPeftModelForCausalLM\n\n"
        f'model = AutoPeftModelForCausalLM.from_pretrained("{folder.name}")\n```\n\n{told}'
    )


def _pairs(model: Any, after: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, d) and B (o, r) of every linear layer that has changed."""
    linear = {f"{n}.weight": n for n, m in model.named_modules() if type(m) is nn.Linear}
    found = {}
    for name, W in model.state_dict().items():
        change = after[name].double() - W.double()
        if not change.any():
            continue
        if name not in linear:
            raise UsageError(
                f"adapter=true: {name} has changed too, which is no linear layer's weight; leave "
                "adapter out, which writes the whole model"
            )
        U, S, Vh = torch.linalg.svd(change, full_matrices=False)
        floor = NOISE * torch.linalg.matrix_norm(after[name].double(), 2)
        rank = int((floor < S).sum())
        if 2 * rank > min(W.shape):
            raise UsageError(
                f"adapter=true: the change of {name} has rank {rank} of {min(W.shape)}, so that an "
                "adapter would be larger than the weight; leave it out"
            )
        root = S[:rank].sqrt()
        found[linear[name]] = (root[:, None] * Vh[:rank]).float(), (U[:, :rank] * root).float()
    return found


def _source_dtype(run: Recorded) -> torch.dtype:
    """In which the source of the weights keeps its own; float32 where there is none."""
    source = run.cfg.model.get("name_or_path")
    if source is None:
        return torch.float32
    from transformers import AutoConfig

    try:
        with run.surroundings():
            local = Path(str(source)).is_dir() or not hub_reachable()
            config = AutoConfig.from_pretrained(str(source), local_files_only=local)
    except (OSError, ValueError):
        print(f"{source} cannot be asked for its type of numbers: weights are written in float32")
        return torch.float32
    found = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _brief(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_words(run: Recorded, data: Mapping[str, Any], model: Any, folder: Path) -> str:
    """Write down what tokens stand for and where answers end; returns what the card says of it."""
    codec = _codec(run, data)
    if codec is None:
        return _vocabulary(run, folder)
    words, name = codec.tokenizer, codec.name
    template = getattr(codec, "template", None)
    if template is not None:
        words.chat_template = template
    words.save_pretrained(folder)
    if model is not None:
        own = model.generation_config.eos_token_id
        ends = [own] if isinstance(own, int) else list(own or ())
        model.generation_config.eos_token_id = list(
            dict.fromkeys([codec.end, words.eos_token_id, *ends])
        )
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = codec.pad
    own_words = "a token a byte" if name == BYTES else f"that of `{Path(str(name)).name}`"
    chat = " with the chat template that it was taught by" if template else ""
    return f"The tokenizer is {own_words}{chat}; an answer ends with token {codec.end}."


def _codec(run: Recorded, data: Mapping[str, Any]) -> PretrainedCodec | None:
    """The tokenizer that a stream was read with; None where it had none of transformers."""
    facts = data.get("facts") or {}
    stream = run.cfg.stream
    name = facts.get("tokenizer", stream.get("tokenizer") if "_target_" in stream else None)
    if name is None:
        return None
    with run.surroundings():
        words = load_tokenizer(str(name))
        if "chat_template" not in facts:
            return PretrainedCodec(words, str(name))
        template, options = facts["chat_template"], facts.get("chat_options") or {}
        return ChatCodec(words, str(name), template, options)


def tokenizer_of(run: Recorded, data: Mapping[str, Any]) -> Any:
    """The tokenizer, of transformers, that a run's stream was read with.

    Raises:
        UsageError: there was none.
    """
    codec = _codec(run, data)
    if codec is None:
        raise UsageError(
            f"general={run.directory}: its stream has no tokenizer that reads any text"
        )
    return codec.tokenizer


def _vocabulary(run: Recorded, folder: Path) -> str:
    if "_target_" not in run.cfg.stream:
        made = run.cfg.stream.get(OBJECT)
        return (
            f"The stream was an object of Python code ({made}), which knows what tokens stand for."
        )
    with run.surroundings():
        stream = build(run.cfg.stream)
    vocabulary = list(getattr(stream, "vocabulary", ()))
    write_atomically(folder / "vocabulary.json", json.dumps(vocabulary, indent=0).encode())
    return (
        "Token i stands for the text at position i of `vocabulary.json`; a sequence is those texts "
        "joined."
    )
