"""Batches whose answers are wrong on purpose."""

import torch
from torch import Generator, Tensor

from cl_bench.contracts import IGNORE, Batch


def relabelled(batch: Batch, classes: range, rng: Generator) -> Batch:
    """The batch with another answer for every sample.

    A class becomes another one, uniformly. A text is given the answer of another row, of the same
    kind where the batch tells kinds; where there is no other, its own stays.

    Args:
        batch: of classes (``y``) or of texts (``input_ids``, ``labels``).
        classes: that a sample may have.
        rng: of the draw.
    """
    if "y" in batch:
        step = torch.randint(1, len(classes), batch["y"].shape, generator=rng).to(batch["y"].device)
        y = (batch["y"] - classes.start + step) % len(classes) + classes.start
        return {**batch, "y": y}
    labels, tokens = batch["labels"], batch["input_ids"]
    kinds = batch.get("kind", torch.zeros(len(labels), dtype=torch.long)).cpu()
    partner = torch.arange(len(labels))
    for kind in torch.unique(kinds):
        rows = (kinds == kind).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=rng)]
        partner[rows] = rows.roll(1)
    answers, width = _answers(labels), labels.shape[1]
    first = (labels != IGNORE).int().argmax(1)
    places = first[:, None] + torch.arange(answers.shape[1], device=labels.device)
    given = answers[partner.to(labels.device)]
    fits = (given != IGNORE) & (places < width)
    places = places.clamp(max=width - 1)
    wrong = torch.full_like(labels, IGNORE)
    row = torch.arange(len(labels), device=labels.device)[:, None].expand_as(places)
    wrong[row[fits], places[fits]] = given[fits]
    found = {**batch, "labels": wrong}
    if tokens.shape == labels.shape:  # the answer stands in the text itself
        found["input_ids"] = torch.where(wrong == IGNORE, tokens, wrong)
        if "attention_mask" in batch:
            held = batch["attention_mask"].bool() & (labels == IGNORE) | (wrong != IGNORE)
            found["attention_mask"] = held.to(batch["attention_mask"].dtype)
    return found


def _answers(labels: Tensor) -> Tensor:
    """The labelled tokens of every row (n, longest), then IGNORE."""
    known = labels != IGNORE
    longest = int(known.sum(1).max())
    order = known.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    return labels.gather(1, order)
