"""Transformers' encoders of images or text as networks that give features."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cl_bench.contracts import Origin, UsageError
from cl_bench.contracts.checking import checked
from cl_bench.hub import hub_reachable
from cl_bench.models.pooling import Pool, Pooling


class Encoder(nn.Module):
    """Features (n, d): the last hidden states of a transformers model, pooled.

    Images are float32 (n, 3, h, w), normalised as the model has learned them; texts int64 (n, L),
    padded at the end with ``pad``.

    Args:
        model: of transformers, without a head.
        pooling: over patches, places or tokens.
        origin: of its weights.

    Attributes:
        trained_on: None: a model's files do not say it in a way that can be read.
    """

    trained_on: str | None = None

    def __init__(self, model: nn.Module, pooling: Pooling, origin: Origin, tokenizer: str) -> None:
        super().__init__()
        self.model = model
        self.pool = Pool(pooling)
        self.origin = origin
        self.tokenizer = tokenizer
        config: Any = model.config
        self.images = getattr(model, "main_input_name", "") == "pixel_values"
        pad = getattr(config, "pad_token_id", None)
        self.pad = int(pad or 0)

    def blocks(self) -> list[nn.Module]:
        """Embeddings, then the model's longest list of layers."""
        lists = [m for m in self.model.modules() if isinstance(m, nn.ModuleList)]
        longest = max(lists, key=len, default=nn.ModuleList())
        first = getattr(self.model, "embeddings", None)
        return [*([first] if first is not None else []), *longest]

    def forward(self, x: Tensor) -> Tensor:
        """Features of images or token ids."""
        if self.images:
            hidden: Tensor = self.model(pixel_values=x).last_hidden_state
            if hidden.dim() == 4:  # convolutions: (n, d, h, w)
                hidden = hidden.flatten(2).transpose(1, 2)
            held = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
        else:
            held = x != self.pad
            given = self.model(input_ids=x, attention_mask=held.long())
            hidden = given.last_hidden_state
        features: Tensor = self.pool(hidden, held)
        return features


@checked("model.")
def encoder(
    name_or_path: str | None = None, pooling: Pooling = "cls", revision: str | None = None
) -> Encoder:
    """A transformers model with its weights, in float32.

    Args:
        name_or_path: a folder that ``save_pretrained`` wrote, or an id on the Hugging Face hub.
        pooling: ``cls`` (the first position), ``mean`` (over positions that hold something) or
            ``last`` (of them).
        revision: branch, tag or commit on the hub.

    Raises:
        UsageError: there is no such model, it cannot be reached, or reads something else.
    """
    if name_or_path is None:
        raise UsageError(
            "model.name_or_path=null: name a folder with config.json and weights, or a model on "
            "the hub, for example model.name_or_path=google/vit-base-patch16-224-in21k"
        )
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise UsageError(
            "model=encoder needs the package 'transformers', which is not installed: "
            "pip install 'cl_bench[language]'"
        ) from error
    # Without network, transformers would try for half a minute.
    there = Path(name_or_path).is_dir()
    options = {
        "revision": revision,
        "trust_remote_code": False,
        "local_files_only": there or not hub_reachable(),
    }
    try:
        config = AutoConfig.from_pretrained(name_or_path, **options)
        model = AutoModel.from_pretrained(name_or_path, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        where = "in that folder" if there else "no such folder, nor on the hub"
        raise UsageError(
            f"model.name_or_path={name_or_path}: no model ({where}: {reason}); without network, "
            "name a folder that save_pretrained wrote"
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        model = model.get_encoder()
    if getattr(model, "main_input_name", None) not in ("pixel_values", "input_ids"):
        raise UsageError(
            f"model.name_or_path={name_or_path}: reads neither images nor text alone "
            f"({type(model).__name__}); name the part that does"
        )
    if any(True for _ in getattr(getattr(model, "pooler", None), "parameters", list)()):
        model.pooler = None  # would be trained, and read by nobody
    source = name_or_path if there or revision is None else f"{name_or_path}@{revision}"
    unknown = "unknown: see the source"
    return Encoder(model, pooling, Origin(source, unknown, unknown), name_or_path)
