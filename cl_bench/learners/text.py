"""What language models have in common: prompts, answers, and how those are generated and scored."""

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cl_bench.contracts import (
    IGNORE,
    Batch,
    LanguageStream,
    PromptStream,
    UsageError,
)
from cl_bench.contracts.learner import Heads
from cl_bench.learners.bypassed import bypassed
from cl_bench.learners.compiled import Compiled
from cl_bench.learners.filled import Filled
from cl_bench.learners.graded import Graded
from cl_bench.learners.modes import reaching
from cl_bench.learners.parted import Parted
from cl_bench.optimizers import OptimizerFactory
from cl_bench.parallel.ranks import decided

CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""What transformers' models call that which they do to logits behind the output layer."""


def body_and_head(model: Any) -> tuple[nn.Module, nn.Module]:
    """What a learner calls the backbone of one of transformers' models, and its output layer."""
    head: nn.Module = model.get_output_embeddings()
    body: nn.Module = model.base_model
    if body is model:  # T5 keeps no module of everything but its output layer
        body = nn.ModuleDict({name: m for name, m in model.named_children() if m is not head})
    return body, head


class LanguageLearner(Filled, Graded, Parted):
    """One of transformers' models with an output layer over a vocabulary.

    On a :class:`PromptStream` an answer is generated greedily and graded as text. Where the
    likeliest token after the true beginning is the right one everywhere, generation would give just
    the right answer, so that only the other samples are generated.

    Args:
        stream: tells the vocabulary and grades answers.
        model: of transformers, a body and an output layer on top of it.
        optimizer: builds an optimizer from parameter groups.
        batch_size: samples of one optimizer step.
        seed: for samples that strategies draw.
        pack: batches that one ``training_step`` learns.
        gradient_checkpointing: recompute activations in the backward pass.
        label_likelihood: on prompts, also score which of the allowed answers is the likeliest.

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
        pack: int,
        gradient_checkpointing: bool,
        label_likelihood: bool,
    ) -> None:
        if not isinstance(stream, LanguageStream):
            raise UsageError(
                "this learner learns text, the stream has none: use learner=classifier, or a "
                "language stream such as +stream=biography/tiny"
            )
        super().__init__(stream, optimizer, batch_size, seed, pack)
        whole: Any = model
        self.backbone, head = body_and_head(whole)
        self.heads = nn.ModuleList([head])
        # Not registered: its parameters are those of backbone and head.
        self._model = (whole,)
        self.config: Any = whole.config.get_text_config()
        if self.config.vocab_size < len(stream.vocabulary):
            raise UsageError(
                f"the model has {self.config.vocab_size} tokens, stream {stream.name!r} needs "
                f"{len(stream.vocabulary)}: leave model.vocabulary to the stream, and "
                "stream.tokenizer to a pretrained model"
            )
        self.prompts = stream if isinstance(stream, PromptStream) else None
        self.label_likelihood = label_likelihood and self.prompts is not None
        self.end, self.pad = stream.end, stream.pad
        self._uncut = self._sparse = False
        self.bypassed = bypassed(whole)
        _still(whole)
        if gradient_checkpointing:
            _checkpoint(whole)
        backend = getattr(whole, "compiled", None)
        self._compiled = None if backend is None else Compiled(self.blocks(), backend)

    base_model_prefix = ""
    """Of names of parameters: PEFT asks whatever has one of transformers' configurations."""

    @property
    def pretrained(self) -> bool:
        """Whether the model was loaded with its weights."""
        return bool(getattr(self.model, "pretrained", False))

    @property
    def model(self) -> Any:
        """The model as transformers knows it, with the weights as they are now."""
        return self._model[0]

    # -- prompts and answers ----------------------------------------------------------------------

    def cut(self, batch: Batch) -> Batch:
        """The batch without columns in which no sample has a token."""
        if self._uncut or self.prompts is None:
            return batch
        prompt = max(1, int(batch["attention_mask"].sum(1).max()))  # all may be empty
        answer = max(1, int((batch["labels"] != IGNORE).sum(1).max()))
        cut = {
            **batch,
            "input_ids": batch["input_ids"][:, :prompt],
            "attention_mask": batch["attention_mask"][:, :prompt],
            "labels": batch["labels"][:, :answer],
        }
        return cut | ({"earlier": batch["earlier"][:, :prompt]} if "earlier" in batch else {})

    def shard(self, computed_in: torch.dtype | None = None, cut_again: bool = False) -> None:
        """Share the weights out; what process 0 has seen of the model holds for all."""
        named = dict(self.model.named_modules())
        names = decided(lambda: [n for n, m in named.items() if m in self.bypassed])
        self.bypassed = frozenset(named[name] for name in names)
        super().shard(computed_in, cut_again)

    @contextmanager
    def longest(self) -> Iterator[None]:
        """Inside, a batch is read as long as the stream makes it."""
        self._uncut = True
        try:
            yield
        finally:
            self._uncut = False

    @property
    def recomputes(self) -> bool:
        """Whether activations are computed again in the backward pass."""
        names = ("is_activation_checkpointing", "is_gradient_checkpointing")  # now and before
        return bool(next((getattr(self.model, n) for n in names if hasattr(self.model, n)), False))

    def keep_masters(self, dtype: torch.dtype) -> None:
        """Weights are float32 from now on, and each pass sees what ``dtype`` makes of them."""
        super().keep_masters(dtype)
        if self.recomputes and self._compiled is None and self.rounding is not None:
            # The backward pass runs what is inside blocks again; a program holds what it saw.
            inside = [m for block in self.blocks() for m in block.modules() if m is not block]
            self.rounding.attach(inside, inputs=False)

    def _left_behind(self) -> dict[int, Any]:
        programs = {} if self._compiled is None else {id(self._compiled): None}
        return {**super()._left_behind(), **programs, id(self.prompts): self.prompts}

    @abstractmethod
    def _generated(self, batch: Batch, options: Mapping[str, Any]) -> Tensor:
        """Tokens (n, at most K) of greedy answers to a batch that is cut."""

    @torch.no_grad()
    def answers(self, batch: Batch) -> list[str]:
        """Greedy answers to prompts, as text."""
        assert self.prompts is not None
        tokens = self._answered(self.cut(self._to_device(batch)))
        return [self.prompts.text(row) for row in tokens.cpu()]

    def _answered(self, batch: Batch, temperature: float = 0.0) -> Tensor:
        """Tokens (n, at most K) of answers to a batch that is cut; 0 is greedy."""
        assert self.prompts is not None
        from transformers import GenerationConfig

        sampled = {"temperature": temperature, "top_k": 0} if temperature else {}
        start = getattr(self.config, "decoder_start_token_id", None)
        # A model's own generation settings may sample or penalise repetition.
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=max(map(self.prompts.limit, batch["example"].tolist())),
            do_sample=bool(temperature),
            num_beams=1,
            pad_token_id=self.pad,
            eos_token_id=self.end,
            decoder_start_token_id=start,
            **sampled,
        )
        with self.evaluating(), self.rounded():
            return self._generated(batch, {"generation_config": settings})

    def finite(self, out: Tensor, batch: Batch) -> Tensor:
        """Whether every sample's logits of labelled tokens say anything: bool (n,)."""
        logits, labels = self.targets(out, batch)
        return (logits.amax(2).isfinite() | (labels == IGNORE)).all(1)

    # -- loss and the services of strategies ------------------------------------------------------

    def _features(self, batch: Batch) -> Tensor:
        return reaching(self.heads[0], lambda: self.forward(batch))

    def readout(self, features: Tensor, heads: Heads = "seen") -> Tensor:
        """Logits (..., vocabulary): one output layer serves all tasks.

        Raises:
            UsageError: there is no such head, or the model changes logits behind its output layer.
        """
        changed = [name for name in CHANGES if getattr(self.config, name, None) not in (None, 1)]
        if changed:
            raise UsageError(
                f"the model changes logits behind its output layer ({changed[0]}="
                f"{getattr(self.config, changed[0])}), so that what the layer makes of features is "
                "not what the model says: use another model"
            )
        logits = super().readout(features, heads)
        added: Tensor | None = getattr(self.model, "final_logits_bias", None)  # BART's
        return logits if added is None else logits + added

    def tokens(self, batch: Batch) -> Tensor:
        """How many tokens each sample has, int64 (n,)."""
        count = batch["attention_mask"].sum(1)
        return count if self.prompts is None else count + (batch["labels"] != IGNORE).sum(1)

    def outputs(self, batch: Batch) -> Tensor:
        """Logits (m, vocabulary) that predict the labels, sample by sample, and no others."""
        self._sparse = True
        try:
            with nullcontext() if self._compiled is None else self._compiled.running():
                return super().outputs(batch)
        finally:
            self._sparse = False

    def loss(self, out: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy, averaged over the labelled tokens of the batch."""
        logits, labels = self.targets(out, batch)
        flat = logits.flatten(0, 1), labels.flatten()
        total = F.cross_entropy(*flat, ignore_index=IGNORE, reduction="sum")
        return total / (labels != IGNORE).sum().clamp_min(1)  # without labels, 0 and not NaN

    def terms(self, batch: Batch) -> Tensor:
        """Labelled tokens."""
        return (batch["labels"] != IGNORE).sum()

    def label_logits(self, out: Tensor, batch: Batch) -> Tensor:
        """Mean logit of every sample's own labels (n,)."""
        logits, labels = self.targets(out, batch)
        learned = labels != IGNORE
        own = logits.gather(2, labels.clamp_min(0)[:, :, None]).squeeze(2)
        return (own * learned).sum(1) / learned.sum(1).clamp_min(1)

    def draw_labels(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch with every label drawn from the prediction after the true tokens before it."""
        moved = self._to_device(batch)
        with torch.no_grad(), self.evaluating():
            logits, wanted = self.targets(self(moved), moved)
        likelihood, learned = logits.float().softmax(2).cpu(), (wanted != IGNORE).cpu()
        drawn = torch.multinomial(likelihood[learned], 1, generator=generator).squeeze(1)
        found = wanted.clone()
        found[learned] = drawn.to(found.device)
        return {**batch, **self._as_labels(found.to(batch["labels"].device), batch)}

    def _as_labels(self, found: Tensor, batch: Batch) -> Batch:
        """The parts of a batch that say labels, with those of :meth:`targets` in their places."""
        labels = batch["labels"].clone()
        labels[labels != IGNORE] = found[found != IGNORE]
        return {"labels": labels}

    def predictions(self, out: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (m, vocabulary) and labels (m,) of all labelled tokens."""
        logits, labels = self.targets(out, batch)
        learned = labels != IGNORE
        return logits[learned], labels[learned]

    @torch.no_grad()
    def own_answers(self, batch: Batch, temperature: float, generator: torch.Generator) -> Batch:
        """A batch of prompts with the model's own answers as labels, as many tokens as fit.

        Raises:
            UsageError: the stream has no prompts.
        """
        if self.prompts is None:
            raise UsageError(
                "the stream has no prompts that the model could answer: use +stream=chat or "
                "another stream of prompts"
            )
        seed = int(torch.randint(2**31, (), generator=generator))
        with torch.random.fork_rng(devices=self._devices()):
            torch.manual_seed(seed)
            tokens = self._answered(self.cut(self._to_device(batch)), temperature)
        width = batch["labels"].shape[1]
        tokens = F.pad(tokens[:, :width], (0, max(0, width - tokens.shape[1])), value=IGNORE)
        done = (tokens == self.end).cumsum(1) - (tokens == self.end).long()
        labels = tokens.masked_fill(done > 0, IGNORE).to(batch["labels"])
        told = {"labels": labels}
        if "earlier" in batch:
            told["earlier"] = torch.full_like(batch["earlier"], IGNORE)
        return {**batch, **told}

    def _devices(self) -> list[int]:
        index = next(self.parameters()).device.index
        return [] if index is None else [index]

    def embeddings(self) -> list[nn.Module]:
        """Input embeddings: of tokens, of learned positions."""
        inside = {id(m) for block in self.blocks() for m in block.modules()}
        return [m for m in super().embeddings() if id(m) not in inside]

    def _layers_of(self, stack: nn.Module, depth: int) -> list[nn.Module]:
        for module in stack.modules():  # from the outside in; OPT's lie two levels down
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return list(module)
        raise UsageError(f"{type(stack).__name__} keeps no list of its {depth} layers")

    def train_heads(self, which: Literal["current", "seen", "all"]) -> None:
        """One head serves all tasks: it is trained unless something holds it."""

    def describe(self) -> str:
        """Structure and configuration of the model."""
        return f"{self!r}\n{json.dumps(self.config.to_dict(), sort_keys=True, default=str)}"


def _still(model: Any) -> None:
    """Text has nothing to tell what reads images or sounds: that stays as it is."""
    if model.config.get_text_config() is model.config:
        return
    reading = {
        p for m in (model.get_decoder(), model.get_output_embeddings()) for p in m.parameters()
    }
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter in reading)


def _checkpoint(model: Any) -> None:
    """Switch on what transformers renamed in version 5."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
