"""General text that no task teaches, as batches on which a language model's loss can be taken."""

import gzip
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from cl_bench.contracts import Batch, UsageError, generator

Objective = Literal["continuation", "span_corruption"]

OWN = "general_text.txt"

NOISE, SPAN = 0.15, 3.0
"""Share of the tokens that T5's pre-training leaves out, and mean length of a gap."""


class Source(Protocol):
    """Where texts lie; the options of the probe say what each is."""

    @property
    def path(self) -> str | None:
        """A file."""

    @property
    def dataset(self) -> str | None:
        """A data set on the hub."""

    @property
    def subset(self) -> str | None:
        """Of the data set."""

    @property
    def split(self) -> str:
        """Of the data set."""

    @property
    def field(self) -> str:
        """Member of a line, or column, that holds the text."""

    @property
    def source(self) -> str:
        """What to call it."""


def read_texts(settings: Source) -> list[str]:
    """The documents: of the package, of a file, or of a data set on the hub.

    Raises:
        UsageError: there is no such source, or nothing in it.
    """
    if settings.dataset is not None:
        texts = _from_hub(settings)
    elif settings.path is not None:
        texts = _from_file(Path(settings.path), settings.field)
    else:
        whole = resources.files("cl_bench.experiment.probes").joinpath(OWN).read_text("utf-8")
        texts = whole.split("\n\n")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UsageError(f"probe.general_text: there is no text in {settings.source}")
    return texts


def _from_file(path: Path, field: str) -> list[str]:
    where = f"probe.general_text.path={path}"
    kinds = (".txt", ".jsonl", ".jsonl.gz")
    if not path.name.endswith(kinds):
        raise UsageError(f"{where}: give a file that ends in {', '.join(kinds)}")
    try:
        content = path.read_bytes()
        if path.name.endswith(".gz"):
            content = gzip.decompress(content)
        text = content.decode("utf-8")
        if path.name.endswith(".txt"):
            return [text]
        return [json.loads(line)[field] for line in text.splitlines() if line.strip()]
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{where}: cannot be read ({error})") from error
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{where}: not every line is an object with a text in {field!r}; say which member has "
            "it with probe.general_text.field=..."
        ) from error


def _from_hub(settings: Source) -> list[str]:
    from datasets import load_dataset

    where = f"probe.general_text.dataset={settings.dataset}"
    try:
        found = load_dataset(settings.dataset, settings.subset, split=settings.split)
    except Exception as error:  # the hub's client raises many kinds
        said = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"{where}: cannot be loaded ({said}); where there is no network, give a file "
            "(probe.general_text.path=...), or leave both out for the text of the package"
        ) from error
    if settings.field not in found.column_names:
        raise UsageError(
            f"{where}: has no column {settings.field!r}; probe.general_text.field is one of "
            f"{', '.join(found.column_names)}"
        )
    texts: list[str] = found[settings.field]
    return texts


def windows(documents: Sequence[Sequence[int]], end: int, length: int, most: int) -> Tensor:
    """Up to ``most`` windows of ``length`` tokens, evenly spread, that do not overlap.

    Args:
        documents: tokens of each; they are joined with ``end`` behind each.
        end: token that ends a text.
        length: tokens of a window.
        most: how many.

    Returns:
        int64 (n, length); n = 0 where the documents are shorter than one window.
    """
    joined = torch.tensor([token for text in documents for token in (*text, end)])
    whole = joined[: len(joined) // length * length].reshape(-1, length)
    if len(whole) <= most:
        return whole
    return whole[torch.arange(most) * len(whole) // most]


def continuation(tokens: Tensor, given: int) -> Batch:
    """A batch of prompts with answers: the first ``given`` tokens of (n, L), then the others."""
    prompt = tokens[:, :given]
    return {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "labels": tokens[:, given:],
    }


def span_corruption(tokens: Tensor, sentinels: Sequence[int], end: int) -> Batch:
    """What T5 was pre-trained on (Raffel et al., JMLR 2020): gaps, and what belongs in them.

    Text and gaps take turns, gaps last; 15 % of the tokens lie in gaps of 3 on average. Which ones
    depends on a window's place alone.

    Args:
        tokens: windows (n, L).
        sentinels: tokens that stand for the first gap, the second, ...
        end: token that ends an answer.
    """
    n, length = tokens.shape
    left_out = max(1, round(length * NOISE))
    gaps = max(1, round(left_out / SPAN))
    marks = torch.tensor(sentinels[:gaps])
    prompts, answers = [], []
    for i in range(n):
        rng = generator(0, "general_text", i)
        kept, lost = _parts(length - left_out, gaps, rng), _parts(left_out, gaps, rng)
        sizes = torch.stack([kept, lost], 1).flatten().tolist()
        pieces = torch.split(tokens[i], sizes)
        prompts.append(torch.cat([x for j in range(gaps) for x in (pieces[2 * j], marks[j, None])]))
        answer = [x for j in range(gaps) for x in (marks[j, None], pieces[2 * j + 1])]
        answers.append(torch.cat([*answer, torch.tensor([end])]))
    prompt = torch.stack(prompts)
    return {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "labels": torch.stack(answers),
    }


def _parts(total: int, parts: int, rng: torch.Generator) -> Tensor:
    """``total`` as a sum of ``parts`` positive numbers, all such sums equally likely."""
    cuts = torch.randperm(total - 1, generator=rng)[: parts - 1].sort().values + 1
    return torch.diff(cuts, prepend=torch.tensor([0]), append=torch.tensor([total]))
