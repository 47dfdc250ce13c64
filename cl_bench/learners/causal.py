"""Causal language models: next tokens of texts, answers to questions and prompts.

Padding stands on the right, so under causal attention no token ever looks at it; what remains is to
leave it out of the loss, of scores and of taps. Generation through transformers alone pads on the
left, as it must.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cl_bench.contracts import IGNORE, Batch, LanguageStream, UsageError
from cl_bench.contracts.options import Index
from cl_bench.learners.labelled import logits_at
from cl_bench.learners.packing import is_single, pack, require_boundaries
from cl_bench.learners.text import LanguageLearner
from cl_bench.optimizers import OptimizerFactory


class Causal(LanguageLearner):
    """A causal language model; outputs are logits (n, L, vocabulary) after every token.

    On prompts with answers, L counts the tokens of the longest prompt with its answer. Where the
    loss alone is asked for (:meth:`outputs`), logits (m, vocabulary) of the m labelled tokens.

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
        gradient_checkpointing: recompute activations in the backward pass.
        label_likelihood: on prompts, also score which of the allowed answers is the likeliest.
        packing: in training, put samples into common sequences in which none sees another.

    Raises:
        UsageError: the stream is not made of text, or the model is no causal language model, has
            too small a vocabulary, or does not keep packed samples apart.
    """

    def __init__(
        self,
        stream: LanguageStream,
        model: nn.Module,
        optimizer: OptimizerFactory,
        batch_size: int,
        seed: int,
        pack: int = 1,
        random_offset: Index = 0,
        gradient_checkpointing: bool = False,
        label_likelihood: bool = False,
        packing: bool = False,
    ) -> None:
        if not isinstance(stream, LanguageStream):
            raise UsageError(
                f"a causal learner reads text, which stream {stream.name!r} does not have: use "
                "learner=classifier, or a language stream such as +stream=biography/tiny"
            )
        config: Any = getattr(model, "config", None)
        if not hasattr(model, "get_output_embeddings") or config.is_encoder_decoder:
            raise UsageError(
                f"learner=causal needs a causal language model, not {type(model).__name__}: "
                "use model=gpt_tiny, or another of transformers' models for causal language"
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
        if packing:
            require_boundaries(model)
        self.random_offset, self.packing = random_offset, packing
        self.kinds = stream.kinds
        self.register_buffer("openings", stream.openings, persistent=False)
        self.openings: Tensor | None
        self.remember_initial_state()

    def joined(self, batch: Batch) -> Batch:
        """A batch of texts: prompts with their answers right behind them, then padding."""
        if self.prompts is None:
            return batch
        batch = self.cut(batch)
        prompts, labels = batch["input_ids"], batch["labels"]
        length = batch["attention_mask"].sum(1, keepdim=True)
        answered = (labels != IGNORE).sum(1, keepdim=True)
        place = torch.arange(prompts.shape[1] + labels.shape[1], device=prompts.device)
        place = place.expand(len(prompts), -1)
        inside = (place - length).clamp(0, labels.shape[1] - 1)
        read = place.clamp_max(prompts.shape[1] - 1)
        told = batch["earlier"].gather(1, read) if "earlier" in batch else IGNORE
        target = torch.where(place < length, told, labels.gather(1, inside))
        target = torch.where(place < length + answered, target, IGNORE)
        prompt = prompts.gather(1, read)
        answer = torch.where(target < 0, self.pad, target)
        tokens = torch.where(place < length, prompt, answer)
        mask = (place < length + answered).to(batch["attention_mask"].dtype)
        if not self._uncut:
            most = int(mask.sum(1).max())
            tokens, target, mask = tokens[:, :most], target[:, :most], mask[:, :most]
        return {**batch, "input_ids": tokens, "labels": target, "attention_mask": mask}

    def forward(self, batch: Batch, head: int | None = None) -> Tensor:
        """Logits (n, L, vocabulary); those at position j predict the token at j + 1."""
        batch = self.joined(batch)
        if self._sparse:
            return self._labelled(batch)
        positions = self._positions_of(batch["input_ids"]) if self._shifted else None
        return self._logits(batch["input_ids"], positions)

    def _logits(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        options = {} if positions is None else {"position_ids": positions}
        logits: Tensor = self.model(input_ids=tokens, use_cache=False, **options).logits
        return logits

    @property
    def _shifted(self) -> bool:
        return self.training and self.random_offset > 0

    def _positions_of(self, tokens: Tensor) -> Tensor:
        offset = torch.randint(self.random_offset + 1, (), device=tokens.device)
        return (offset + torch.arange(tokens.shape[1], device=tokens.device))[None]

    def _labelled(self, batch: Batch) -> Tensor:
        """Logits (m, vocabulary) that predict the labels of a joined batch, sample by sample."""
        tokens, mask = batch["input_ids"], batch["attention_mask"]
        # What predicts a sample's first label stands before it.
        predicts = F.pad(batch["labels"][:, 1:] != IGNORE, (0, 1))
        positions = self._positions_of(tokens) if self._shifted else None
        if self.packing:
            packed = pack(tokens, mask, self.pad, is_single(self.model))
            offset = 0 if positions is None else positions[:, :1]
            tokens, positions = packed.tokens, packed.positions + offset
            places = packed.places[predicts]
        else:
            places = predicts.flatten().nonzero().squeeze(1)
        self._filled(mask, tokens.numel())
        return logits_at(places, self.heads[0], lambda: self._logits(tokens, positions))

    def targets(self, out: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits before the last token, and the tokens after the first; of labels alone as given.

        The latter are one row, (1, m, vocabulary) and (1, m).
        """
        labels = self.joined(batch)["labels"][:, 1:]
        if out.dim() == 2:
            return out[None], labels[labels != IGNORE][None]
        return out[:, :-1], labels

    def terms(self, batch: Batch) -> Tensor:
        """Labelled tokens; a text's first one is never predicted."""
        labelled = batch["labels"] != IGNORE
        if self.prompts is None:
            return labelled[:, 1:].sum()
        told = (batch["earlier"] != IGNORE).sum() if "earlier" in batch else 0
        unread = labelled.any(1) & ~batch["attention_mask"].bool().any(1)
        return labelled.sum() - unread.sum() + told

    def _as_labels(self, found: Tensor, batch: Batch) -> Batch:
        if "earlier" not in batch:
            return super()._as_labels(found, batch)
        place = torch.arange(1, found.shape[1] + 1, device=found.device)
        answers = place >= batch["attention_mask"].sum(1, keepdim=True)
        labels, earlier = batch["labels"].clone(), batch["earlier"].clone()
        labels[labels != IGNORE] = found[(found != IGNORE) & answers]
        earlier[earlier != IGNORE] = found[(found != IGNORE) & ~answers]
        return {"labels": labels, "earlier": earlier}

    def _generated(self, batch: Batch, options: Mapping[str, Any]) -> Tensor:
        tokens, mask = batch["input_ids"], batch["attention_mask"]
        width = tokens.shape[1]
        shift = width - mask.sum(1, keepdim=True)
        place = torch.arange(width, device=tokens.device) - shift
        tokens = torch.where(place < 0, self.pad, tokens.gather(1, place.clamp_min(0)))
        mask = (place >= 0).to(mask.dtype)
        found: Tensor = self.model.generate(input_ids=tokens, attention_mask=mask, **options)
        return found[:, width:]

    def details(self, out: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """Scores of the first answer token, and exact matches by kind of question.

        With prompts, only what :meth:`LanguageLearner.details` has.

        ``first_token``: 1 where the likeliest first token is right; ``first_token_probability``:
        the probability of the right one; ``type_rate``: 1 where the likeliest first token can begin
        an answer of the right kind.
        """
        if self.prompts is not None:
            return super().details(out, batch)
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

    @torch.no_grad()
    def generate(self, batch: Batch, steps: int) -> Tensor:
        """Greedy answers.

        Args:
            batch: what stands before each sample's first label is its prompt.
            steps: the longest answer, its end included.

        Returns:
            int64 (n, steps): tokens up to the end token, then padding.
        """
        batch = self.joined(self._to_device(batch))
        tokens, labelled = batch["input_ids"], batch["labels"] != IGNORE
        at = torch.where(labelled.any(1), labelled.int().argmax(1), batch["attention_mask"].sum(1))
        tokens = F.pad(tokens, (0, steps), value=self.pad)
        answers = torch.full((len(tokens), steps), self.pad, device=tokens.device)
        rows = torch.arange(len(tokens), device=tokens.device)
        going = torch.ones_like(at, dtype=torch.bool)
        with self.evaluating(), self.rounded():
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

    def counted(self, batch: Batch, layer: str) -> Tensor:
        """Everything but padding, bool (n, L)."""
        return self.joined(batch)["attention_mask"].bool()

    def representation(self, hidden: Tensor, batch: Batch, name: str) -> Tensor:
        """The state (n, d) at every sample's last prompt token, from which its answer follows."""
        batch = self.joined(batch)
        first = (batch["labels"][:, 1:] != IGNORE).int().argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), first]

    def blocks(self) -> list[nn.Module]:
        """The model's layers, from the input upwards."""
        return self._layers_of(self.backbone, self.config.num_hidden_layers)
