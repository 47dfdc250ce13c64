"""Encoder-decoders: a prompt is read, an answer is written.

Encoder and decoder have masks of their own; cross-attention's keys and values see the encoder's
positions, everything else in the decoder the answer's.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_bench.contracts import IGNORE, Batch, LanguageStream, PromptStream, UsageError
from cl_bench.contracts.learner import Mode, Of, PerSample
from cl_bench.learners.labelled import logits_at
from cl_bench.learners.per_sample import squares_of
from cl_bench.learners.text import LanguageLearner
from cl_bench.optimizers import OptimizerFactory

CROSS = ("EncDecAttention", "encoder_attn")
"""What T5 and BART call the attention from the decoder to the encoder."""

READING = ("k", "v", "k_proj", "v_proj")
"""What they call the layers in it that read the encoder."""


class Seq2Seq(LanguageLearner):
    """An encoder-decoder such as T5; outputs are logits (n, K, vocabulary) for the answer's tokens.

    Where the loss alone is asked for (:meth:`outputs`), logits (m, vocabulary) of the m labelled
    tokens.

    Args:
        stream: prompts with answers.
        model: of transformers' models for conditional generation.
        optimizer: builds an optimizer from parameter groups.
        batch_size: samples of one optimizer step.
        seed: for samples that strategies draw.
        pack: batches that one ``training_step`` learns.
        gradient_checkpointing: recompute activations in the backward pass.
        label_likelihood: also score which of the allowed answers is the likeliest.

    Raises:
        UsageError: the stream has no prompts, or the model is no such model.
    """

    def __init__(
        self,
        stream: LanguageStream,
        model: nn.Module,
        optimizer: OptimizerFactory,
        batch_size: int,
        seed: int,
        pack: int = 1,
        gradient_checkpointing: bool = False,
        label_likelihood: bool = False,
    ) -> None:
        if not isinstance(stream, PromptStream):
            raise UsageError(
                "learner=seq2seq reads prompts and writes answers, the stream has none: use "
                "+stream=t5_cl_fewshot or another of the t5_cl streams"
            )
        if stream.teaches_prompts:
            raise UsageError(
                "an encoder-decoder learns the answer behind a prompt, not the answers inside it: "
                "add stream.turns=last, or use a causal model"
            )
        config: Any = getattr(model, "config", None)
        names = {name for name, _ in model.named_modules()}
        crossed = any(part in name.split(".") for name in names for part in CROSS)
        if not getattr(config, "is_encoder_decoder", False) or not crossed:
            raise UsageError(
                f"learner=seq2seq needs an encoder-decoder of the T5 or BART family, not "
                f"{type(model).__name__}: use model=t5_tiny or t5_small, or learner=causal"
            )
        super().__init__(
            stream,
            model,
            optimizer,
            batch_size,
            seed,
            pack,
            gradient_checkpointing,
            label_likelihood,
        )
        self.start: int = config.decoder_start_token_id
        self.remember_initial_state()

    def _source(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The prompt with what an encoder wants behind it, and its mask."""
        assert self.prompts is not None
        tokens, mask = batch["input_ids"], batch["attention_mask"]
        for token in self.prompts.codec.closing:
            places = torch.arange(tokens.shape[1] + 1, device=tokens.device)
            behind = places == mask.sum(1, keepdim=True)
            tokens = torch.where(behind, token, nn.functional.pad(tokens, (0, 1), value=self.pad))
            mask = nn.functional.pad(mask, (0, 1)) + behind.to(mask.dtype)
        return tokens, mask

    def forward(self, batch: Batch, head: int | None = None) -> Tensor:
        """Logits (n, K, vocabulary), K that of the longest answer in the batch."""
        batch = self.cut(batch)
        tokens, mask = self._source(batch)
        labels = batch["labels"]
        before = torch.where(labels == IGNORE, self.pad, labels)[:, :-1]

        def logits() -> Tensor:
            found: Tensor = self.model(
                input_ids=tokens,
                attention_mask=mask,
                decoder_input_ids=nn.functional.pad(before, (1, 0), value=self.start),
                use_cache=False,
            ).logits
            return found

        if not self._sparse:
            return logits()
        labelled = labels != IGNORE
        self._filled(mask.bool(), tokens.numel())
        self._filled(labelled, labels.numel())
        return logits_at(labelled.flatten().nonzero().squeeze(1), self.heads[0], logits)

    def targets(self, out: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and labels (n, K); of labels alone one row, (1, m, vocabulary) and (1, m)."""
        if out.dim() == 2:
            return out[None], batch["labels"][batch["labels"] != IGNORE][None]
        return out, batch["labels"][:, : out.shape[1]]

    def _generated(self, batch: Batch, options: Mapping[str, Any]) -> Tensor:
        tokens, mask = self._source(batch)
        found: Tensor = self.model.generate(input_ids=tokens, attention_mask=mask, **options)
        return found[:, 1:]  # behind the start token

    def gradients(
        self,
        batch: Batch,
        of: Of = "loss",
        per_sample: PerSample = False,
        mode: Mode = "eval",
    ) -> dict[str, Tensor]:
        """As for every learner; one sample after another, as masks do not go through ``vmap``."""
        if not per_sample:
            return super().gradients(batch, of, mode=mode)
        rows = range(len(batch["labels"]))
        single = super().gradients
        each = [single({k: v[i : i + 1] for k, v in batch.items()}, of, mode=mode) for i in rows]
        found = {name: torch.stack([one[name] for one in each]) for name in each[0]}
        return squares_of(found) if per_sample == "squares" else found

    def counted(self, batch: Batch, layer: str) -> Tensor:
        """Prompt positions for what reads the encoder, answer positions for the rest of it."""
        batch = self.cut(batch)
        *path, last = layer.split(".")
        crossing = any(part in path for part in CROSS) and last in READING
        if crossing or layer.startswith("backbone.encoder.") or ".encoder.layers." in layer:
            return self._source(batch)[1].bool()
        return batch["labels"] != IGNORE

    def representation(self, hidden: Tensor, batch: Batch, name: str) -> Tensor:
        """The state (n, d) at the end of the prompt, or where the answer begins in the decoder."""
        if ".decoder." in name:
            return hidden[:, 0]
        last = self._source(self.cut(batch))[1].sum(1) - 1
        return hidden[torch.arange(len(hidden), device=hidden.device), last]

    def blocks(self) -> list[nn.Module]:
        """The encoder's blocks, then the decoder's."""
        whole = self.model
        encoder, decoder = whole.get_encoder(), whole.get_decoder()
        depth = getattr(self.config, "num_decoder_layers", None)
        depth = depth or getattr(self.config, "decoder_layers", self.config.num_hidden_layers)
        first = self._layers_of(encoder, self.config.num_hidden_layers)
        return [*first, *self._layers_of(decoder, depth)]
