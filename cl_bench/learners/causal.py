"""Causal language models: next tokens of texts, answers to questions.

Padding stands on the right, so under causal attention no token ever looks at it; what remains is to
leave it out of the loss, of scores and of taps.
"""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cl_bench.contracts import IGNORE, Batch, LanguageStream, UsageError
from cl_bench.learners.base import BaseLearner, OptimizerFactory


class Causal(BaseLearner):
    """A causal language model; outputs are logits (n, L, vocabulary) after every token.

    Args:
        stream: tells the vocabulary and, where it asks several kinds of questions, what their
            answers can begin with.
        model: of transformers' causal language models: a body and an output layer on top of it.
        optimizer: builds an optimizer from parameter groups.
        batch_size: samples of one optimizer step.
        seed: for samples that strategies draw.
        pack: batches that one ``training_step`` learns.
        random_offset: in training, positions of a batch start at a number drawn from 0 to this;
            of use where positions are learned and texts are short.

    Raises:
        UsageError: the stream is not made of text, or the model has too small a vocabulary.
    """

    def __init__(
        self,
        stream: LanguageStream,
        model: nn.Module,
        optimizer: OptimizerFactory,
        batch_size: int,
        seed: int,
        pack: int = 1,
        random_offset: int = 0,
    ) -> None:
        if not isinstance(stream, LanguageStream):
            raise UsageError(
                "learner=causal learns text, stream has none: use learner=classifier, or a "
                "language stream such as +stream=biography/tiny"
            )
        if not hasattr(model, "base_model") or not hasattr(model, "get_output_embeddings"):
            raise UsageError(
                f"learner=causal needs a causal language model, not {type(model).__name__}: "
                "use model=gpt_tiny, or another of transformers' models for causal language"
            )
        super().__init__(stream, optimizer, batch_size, seed, pack)
        causal: Any = model
        self.backbone = causal.base_model
        self.heads = nn.ModuleList([causal.get_output_embeddings()])
        self.config: Any = causal.config
        if self.config.vocab_size < len(stream.vocabulary):
            raise UsageError(
                f"the model has {self.config.vocab_size} tokens, stream {stream.name!r} needs "
                f"{len(stream.vocabulary)}: leave model.vocabulary to the stream"
            )
        self.random_offset = random_offset
        self.kinds = stream.kinds
        self.end, self.pad = stream.end, stream.pad
        self.register_buffer("openings", stream.openings, persistent=False)
        self.openings: Tensor | None
        self.remember_initial_state()

    def forward(self, batch: Batch, head: int | None = None) -> Tensor:
        """Logits (n, L, vocabulary); those at position j predict the token at j + 1."""
        tokens = batch["input_ids"]
        options = {}
        if self.training and self.random_offset:
            offset = torch.randint(self.random_offset + 1, (), device=tokens.device)
            positions = offset + torch.arange(tokens.shape[1], device=tokens.device)
            options["position_ids"] = positions[None]
        hidden = self.backbone(input_ids=tokens, use_cache=False, **options).last_hidden_state
        logits: Tensor = self.heads[0](hidden)
        return logits

    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy, averaged over the labelled tokens of the batch."""
        labels = batch["labels"][:, 1:]
        return F.cross_entropy(out[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORE)

    def loss_terms(self, batch: Batch) -> int:
        """Labelled tokens."""
        return int((batch["labels"][:, 1:] != IGNORE).sum())

    def score(self, out: Tensor, batch: Batch) -> Tensor:
        """1 where greedy decoding gives exactly the labelled tokens.

        It does if and only if, after the true beginning of the answer, the likeliest token is the
        right one everywhere: one forward pass tells.
        """
        labels = batch["labels"][:, 1:]
        right = out[:, :-1].argmax(2) == labels
        return (right | (labels == IGNORE)).all(1).double()

    def details(self, out: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """Scores of the first answer token, and exact matches by kind of question.

        ``first_token``: 1 where the likeliest first token is right; ``first_token_probability``:
        the probability of the right one; ``type_rate``: 1 where the likeliest first token can begin
        an answer of the right kind.
        """
        labels = batch["labels"][:, 1:]
        first = (labels != IGNORE).int().argmax(1, keepdim=True)
        logits = out.gather(1, first[:, :, None].expand(-1, -1, out.shape[2])).squeeze(1)
        target, predicted = labels.gather(1, first).squeeze(1), logits.argmax(1)
        hit = (predicted == target).double()
        probability = logits.float().softmax(1).gather(1, target[:, None]).squeeze(1)
        found = {"first_token": hit, "first_token_probability": probability}
        if self.openings is None or "kind" not in batch:
            return found
        exact, missing = self.score(out, batch), torch.full_like(hit, torch.nan)
        found["type_rate"] = self.openings[batch["kind"], predicted].double()
        for number, kind in enumerate(self.kinds):
            asked = batch["kind"] == number
            found[f"exact_match/{kind}"] = torch.where(asked, exact, missing)
            found[f"first_token/{kind}"] = torch.where(asked, hit, missing)
        return found

    def gradients(
        self,
        batch: Batch,
        of: Literal["loss", "logits"] = "loss",
        per_sample: bool = False,
    ) -> dict[str, Tensor]:
        """As for every learner.

        The loss of a batch weighs tokens alike, that of a sample its own tokens: where sequences
        differ in length, the batch's gradient is not the mean of the samples'.
        """
        # Fused attention has no batching rule for per-sample gradients.
        plain = sdpa_kernel(SDPBackend.MATH) if per_sample else nullcontext()
        with plain:
            return super().gradients(batch, of, per_sample)

    def label_logits(self, out: Tensor, batch: Batch) -> Tensor:
        """Mean logit of every sample's own labels (n,)."""
        labels = batch["labels"][:, 1:]
        learned = labels != IGNORE
        own = out[:, :-1].gather(2, labels.clamp_min(0)[:, :, None]).squeeze(2)
        return (own * learned).sum(1) / learned.sum(1).clamp_min(1)

    def draw_labels(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with every label drawn from the prediction after the true tokens before it."""
        with torch.no_grad(), self._evaluating():
            likelihood = self(self._to_device(batch))[:, :-1].float().softmax(2).cpu()
        labels = batch["labels"].clone()
        learned = labels[:, 1:] != IGNORE
        drawn = torch.multinomial(likelihood[learned.cpu()], 1, generator=generator).squeeze(1)
        labels[:, 1:][learned] = drawn.to(labels.device)
        return {**batch, "labels": labels}

    @torch.no_grad()
    def generate(self, batch: Batch, steps: int) -> Tensor:
        """Greedy answers.

        Args:
            batch: what stands before each sample's first label is its prompt.
            steps: the longest answer, its end included.

        Returns:
            int64 (n, steps): tokens up to the end token, then padding.
        """
        batch = self._to_device(batch)
        tokens, labelled = batch["input_ids"], batch["labels"] != IGNORE
        at = torch.where(labelled.any(1), labelled.int().argmax(1), batch["attention_mask"].sum(1))
        tokens = F.pad(tokens, (0, steps), value=self.pad)
        answers = torch.full((len(tokens), steps), self.pad, device=tokens.device)
        rows = torch.arange(len(tokens), device=tokens.device)
        going = torch.ones_like(at, dtype=torch.bool)
        with self._evaluating():
            for step in range(steps):
                # What stands to the right of the position that is read makes no difference to it.
                nearest = self({"input_ids": tokens[:, : int(at.max()) + step]})
                chosen = nearest[rows, at + step - 1].argmax(1)
                answers[:, step] = torch.where(going, chosen, self.pad)
                tokens[rows, at + step] = chosen
                going &= chosen != self.end
                if not going.any():
                    break
        return answers

    def counted(self, batch: Batch) -> Tensor:
        """Everything but padding, bool (n, L)."""
        return batch["attention_mask"].bool()

    def representation(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The state (n, d) at every sample's last prompt token, from which its answer follows."""
        first = (batch["labels"][:, 1:] != IGNORE).int().argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), first]

    def blocks(self) -> list[nn.Module]:
        """The model's layers, from the input upwards."""
        depth = self.config.num_hidden_layers
        for module in self.backbone.children():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return list(module)
        raise UsageError(f"{type(self.backbone).__name__} keeps no list of its {depth} layers")

    def train_heads(self, which: Literal["current", "seen"]) -> None:
        """One head serves all tasks: it is trained unless something holds it."""

    def describe(self) -> str:
        """Structure and configuration of the model."""
        return f"{self!r}\n{json.dumps(self.config.to_dict(), sort_keys=True, default=str)}"
