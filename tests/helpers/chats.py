"""Tokenizers with chat templates of three families' shape, tiny models for them, files of rows."""

import functools
import json
import tempfile
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LLAMA = (
    "{{- bos_token -}}{%- for m in messages -%}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{%- endfor -%}{%- if add_generation_prompt -%}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"
)

QWEN = (
    "{%- set ns = namespace(last=-1) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}"
    "{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last -%}{{- '<think>\n\n</think>\n\n' -}}"
    "{%- endif -%}{{- m.content + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}{%- endif -%}"
)

GEMMA = (
    "{{- bos_token -}}"
    "{%- if messages[0]['role'] == 'system' -%}{%- set head = messages[0]['content'] + '\n\n' -%}"
    "{%- set turns = messages[1:] -%}{%- else -%}{%- set head = '' -%}"
    "{%- set turns = messages -%}{%- endif -%}"
    "{%- for m in turns -%}{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('roles must alternate user/assistant') -}}{%- endif -%}"
    "{%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}"
    "{{- '<start_of_turn>' + role + '\n' + (head if loop.first else '') -}}"
    "{{- m['content'] | trim -}}{{- '<end_of_turn>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"
)

FAMILIES = {
    "llama": (LLAMA, "<|begin_of_text|>", "<|end_of_text|>",
              ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), ()),
    "qwen3": (QWEN, None, "<|endoftext|>", ("<|im_start|>", "<|im_end|>"),
              ("<think>", "</think>")),
    "gemma3": (GEMMA, "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), ()),
}  # fmt: skip


def tokenizer(family):
    """A token a byte, the family's special tokens, its template; it adds its first token itself."""
    template, bos, eos, special, plain = FAMILIES[family]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    names = {"bos_token": bos} if bos else {}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, **names)
    made.add_special_tokens({"additional_special_tokens": list(special)})
    made.add_tokens(list(plain))
    if bos:
        from tokenizers.processors import TemplateProcessing

        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.bos_token_id)]
        )
    made.chat_template = template
    return made


def model(family, size, seed=0):
    torch.manual_seed(seed)
    shape = {
        "vocab_size": size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "head_dim": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
    }
    if family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    if family == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape))
    config = transformers.Gemma3TextConfig(**shape, sliding_window=64, query_pre_attn_scalar=8)
    return transformers.Gemma3ForCausalLM(config)


@functools.cache
def saved(family, dtype="bfloat16"):
    """A folder as ``save_pretrained`` leaves it."""
    folder = Path(tempfile.mkdtemp(prefix=f"{family}-"))
    words = tokenizer(family)
    words.save_pretrained(folder)
    made = model(family, len(words)).to(getattr(torch, dtype))
    made.config.eos_token_id = made.generation_config.eos_token_id = words.eos_token_id
    made.save_pretrained(folder)
    return folder


def write(path, rows):
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def said(*turns, system=None):
    """A row of messages: what user and assistant say in turn."""
    roles = ("user", "assistant")
    found = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + found}
