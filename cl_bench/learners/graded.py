"""How a language model's answers are scored: graded as text, by the likeliest choice, by loss."""

from abc import abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cl_bench.contracts import IGNORE, Batch, PromptStream
from cl_bench.learners.module import BaseLearner


class Graded(BaseLearner):
    """Scores of samples, and what else is told of them.

    Attributes:
        prompts: the stream, where it grades answers; None elsewhere.
        label_likelihood: also score which of the allowed answers is the likeliest.
        end: token that ends an answer.
    """

    prompts: PromptStream | None
    label_likelihood: bool
    end: int

    @abstractmethod
    def targets(self, out: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (n, K, vocabulary) and the labels (n, K) that they predict, side by side."""

    @abstractmethod
    def answers(self, batch: Batch) -> list[str]:
        """Greedy answers to prompts, as text."""

    def _hits(self, out: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, labels = self.targets(out, batch)
        return (logits.argmax(2) == labels) | (labels == IGNORE), labels

    def score(self, out: Tensor, batch: Batch) -> Tensor:
        """The metric of each sample's task; without prompts, exact tokens.

        Where answers are graded they are generated greedily, which gives exactly the labelled
        tokens if and only if, after the true beginning of the answer, the likeliest token is the
        right one everywhere: one forward pass tells.
        """
        hits, labels = self._hits(out, batch)
        if self.prompts is None:
            return hits.all(1).double()
        seen = [self.prompts.sees(n) for n in batch["example"].tolist()]
        scores = torch.empty(len(seen), dtype=torch.float64, device=out.device)
        for kind in sorted(set(seen)):
            rows = [i for i, one in enumerate(seen) if one == kind]
            part = {name: value[rows] for name, value in batch.items()}
            if kind == "answer":
                scores[rows] = self._graded(part, hits[rows], labels[rows])
            elif kind == "choice":
                scores[rows] = self._likeliest(part).to(scores)
            else:
                scores[rows] = self._answer_loss(out, batch)[rows].neg().exp()
        return scores

    def _graded(self, batch: Batch, hits: Tensor, labels: Tensor) -> Tensor:
        assert self.prompts is not None
        sure = hits.all(1) & (labels == self.end).any(1)  # what is cut would have been generated
        numbers = batch["example"].tolist()
        texts = [self.prompts.answer(n) for n in numbers]
        open_ = (~sure).nonzero().squeeze(1)
        if len(open_):
            given = self.answers({name: value[open_] for name, value in batch.items()})
            for i, answer in zip(open_.tolist(), given, strict=True):
                texts[i] = answer
        grades = [self.prompts.grade(n, text) for n, text in zip(numbers, texts, strict=True)]
        return torch.tensor(grades, dtype=torch.float64, device=hits.device)

    def _answer_loss(self, out: Tensor, batch: Batch) -> Tensor:
        """Mean loss (nats) of every sample's labelled tokens, float64 (n,)."""
        logits, labels = self.targets(out, batch)
        flat = logits.flatten(0, 1).float(), labels.flatten()
        losses = F.cross_entropy(*flat, ignore_index=IGNORE, reduction="none")
        learned = labels != IGNORE
        return losses.double().view_as(labels).sum(1) / learned.sum(1).clamp_min(1)

    def details(self, out: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """``loss``, where that is the metric; ``label_likelihood``, if asked for.

        ``label_likelihood`` is 1 where the right answer is the likeliest allowed: the sum of its
        tokens' log-likelihoods, end token included, is compared. A model that answers in another
        task's words can still score here.
        """
        if self.prompts is None:
            return {}
        found = {}
        by_loss = [self.prompts.sees(n) == "loss" for n in batch["example"].tolist()]
        if any(by_loss):
            known = torch.tensor(by_loss, device=out.device)
            found["loss"] = self._answer_loss(out, batch).where(known, torch.nan)
        if self.label_likelihood:
            found["label_likelihood"] = self._likeliest(batch)
        return found

    @torch.no_grad()
    def _likeliest(self, batch: Batch) -> Tensor:
        assert self.prompts is not None
        numbers = batch["example"].tolist()
        options = [self.prompts.options(n) for n in numbers]
        found = torch.full((len(numbers),), torch.nan, dtype=torch.float64)
        for allowed in sorted(set(map(tuple, options))):
            rows = [i for i, own in enumerate(options) if tuple(own) == allowed]
            if not allowed:
                continue
            part = {name: value[rows] for name, value in batch.items()}
            likelihoods = torch.stack([self._likelihood(part, answer) for answer in allowed], 1)
            for i, best in zip(rows, likelihoods.argmax(1).tolist(), strict=True):
                found[i] = float(allowed[best] == self.prompts.answer(numbers[i]))
        return found.to(batch["labels"].device)

    def _likelihood(self, batch: Batch, answer: str) -> Tensor:
        assert self.prompts is not None
        labels = torch.full_like(batch["labels"], IGNORE)
        for row, example in zip(labels, batch["example"].tolist(), strict=True):
            tokens = self.prompts.answer_tokens(example, answer)
            row[: len(tokens)] = torch.tensor(tokens, device=labels.device)
        changed = {**batch, "labels": labels}
        logits, wanted = self.targets(self(changed), changed)
        own = logits.float().log_softmax(2).gather(2, wanted.clamp_min(0)[:, :, None]).squeeze(2)
        return (own * (wanted != IGNORE)).sum(1)
