"""Pretrained language models: from a folder that ``save_pretrained`` wrote, or from the hub."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from torch import nn

from cl_bench.contracts import UsageError
from cl_bench.contracts.checking import checked
from cl_bench.hub import hub_reachable
from cl_bench.models.gpt import require_transformers


@checked("model.")
def pretrained(
    name_or_path: str | None = None,
    revision: str | None = None,
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None,
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32",
    compile: bool | Literal["inductor", "aot_eager"] = False,
    liger: bool = False,
) -> nn.Module:
    """A causal model or an encoder-decoder with its weights.

    Args:
        name_or_path: a folder, or an id on the Hugging Face hub.
        revision: branch, tag or commit on the hub.
        attention: which of transformers' implementations; None leaves it to the model.
        dtype: of the weights.
        compile: whether training runs blocks that ``torch.compile`` made, and by which backend:
            true is ``inductor``.
        liger: whether norms, rotary positions and MLPs are Liger's kernels (Hsu et al., 2024),
            which want a CUDA device. Its fused loss is not used: strategies read logits.

    Raises:
        UsageError: there is no such model, it cannot be reached, or it is of another kind; or there
            is no CUDA device for Liger, or it is not installed.
    """
    if name_or_path is None:
        raise UsageError(
            "model.name_or_path=null: name a folder with config.json and weights, or a model on "
            "the hub, for example model.name_or_path=google-t5/t5-small"
        )
    require_transformers()
    if liger:
        _require_liger()
    import torch
    from transformers import AutoConfig

    # Without network, transformers would try for half a minute.
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    local = Path(name_or_path).is_dir() or not hub_reachable()
    try:
        config = AutoConfig.from_pretrained(name_or_path, local_files_only=local, **options)
        kind = _kind(config)
        how = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
        if torch.get_default_device().type == "meta":  # shapes are wanted, and no numbers
            model: Any = kind.from_config(config, **how)
        else:
            model = kind.from_pretrained(name_or_path, local_files_only=local, **how, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        where = (
            "in that folder" if Path(name_or_path).is_dir() else "no such folder, nor on the hub"
        )
        raise UsageError(
            f"model.name_or_path={name_or_path}: no language model ({where}: {reason}). Without "
            "network, name a folder that save_pretrained wrote (model=hub "
            "model.name_or_path=/path/to/it), or use a model from scratch: model=t5_tiny or "
            "model=gpt_tiny"
        ) from error
    if liger:
        from transformers.integrations.liger import apply_liger_kernel

        apply: Any = apply_liger_kernel
        apply(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    model.pretrained = True
    if compile:
        model.compiled = "inductor" if compile is True else compile
    made: nn.Module = model
    return made


def _require_liger() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UsageError(
            "model.liger=true: Liger's kernels need a CUDA device, and there is none; use "
            "model.liger=false"
        )
    if find_spec("liger_kernel") is None:
        raise UsageError(
            "model.liger=true: needs a package that is not installed: pip install 'cl_bench[liger]'"
        )


def _kind(config: Any) -> Any:
    """Which of transformers' families a configuration belongs to."""
    import transformers as library

    if config.is_encoder_decoder:
        return library.AutoModelForSeq2SeqLM
    if type(config) in library.MODEL_FOR_CAUSAL_LM_MAPPING:
        return library.AutoModelForCausalLM
    return library.AutoModelForImageTextToText  # a language model with eyes
