"""Rows over several streams: mean ranks, Friedman's test, Nemenyi's critical difference.

As Demšar, "Statistical comparisons of classifiers over multiple data sets", JMLR 2006. Streams
count once, whatever the number of blocks that they have; bounds have no rank, and nothing is ranked
across what was known at test time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from cl_bench.report.rows import LEVEL, Block
from cl_bench.report.study import Study

FEWEST = 3
"""Rows, and streams, below which there is nothing to test."""

FEW = 10
"""Streams below which the test's distribution is rough (Iman & Davenport, 1980)."""


@dataclass(frozen=True)
class Ranks:
    """Rows that several streams have.

    Attributes:
        title: what tells these rows from others, if anything does.
        task_id_known: at test time, for all of them.
        streams: names, N of them.
        labels: of the rows, the best mean rank first, k of them.
        scores: mean ACC (N, k), in [0, 1].
    """

    title: str
    task_id_known: bool
    streams: list[str]
    labels: list[str]
    scores: NDArray[np.float64]

    @cached_property
    def ranks(self) -> NDArray[np.float64]:
        """Mean over streams (k,); 1 is best, equal scores share their ranks."""
        mean: NDArray[np.float64] = stats.rankdata(-self.scores, axis=1).mean(0)
        return mean

    @property
    def p(self) -> float:
        """Of Friedman's test: that all rows are alike; NaN where every rank is shared."""
        if np.ptp(self.scores, axis=1).max() == 0:
            return math.nan
        return float(stats.friedmanchisquare(*self.scores.T).pvalue)

    @property
    def critical(self) -> float:
        """Mean ranks that are further apart are told apart at :data:`LEVEL` (Nemenyi, 1963)."""
        N, k = self.scores.shape
        q = float(stats.studentized_range.ppf(1 - LEVEL, k, np.inf)) / math.sqrt(2)
        return q * math.sqrt(k * (k + 1) / (6 * N))


def over_streams(study: Study) -> list[Ranks]:
    """What the blocks of different streams say together, where there are enough of them."""
    grouped: dict[tuple[bool, bool, bool], dict[str, list[Block]]] = {}
    for block in study.blocks:
        trials = [trial for row in block.rows for trial in row.trials]
        keeps = any(trial.keeps_samples for trial in trials)
        key = (block.task_id_known, keeps, bool(trials[0].features))
        grouped.setdefault(key, {}).setdefault(block.stream, []).append(block)
    found = []
    for (known, keeps, features), streams in sorted(grouped.items()):
        every = [block for blocks in streams.values() for block in blocks]
        ranked = [{row.label for row in block.rows if not row.bound} for block in every]
        common = sorted(set.intersection(*ranked))
        if len(common) < FEWEST or len(streams) < FEWEST:
            continue
        scores = np.array(
            [[_mean(blocks, label) for label in common] for blocks in streams.values()]
        )
        if np.isnan(scores).any():
            continue
        kinds = (("on features", features), ("with old samples kept", keeps))
        title = " ".join(["streams together", *(kind for kind, holds in kinds if holds)])
        ranks = Ranks(title, known, list(streams), common, scores)
        order = np.argsort(ranks.ranks, kind="stable")
        labels = [common[i] for i in order]
        found.append(Ranks(title, known, list(streams), labels, scores[:, order]))
    return found


def _mean(blocks: Sequence[Block], label: str) -> float:
    """ACC of a row, each block of the stream alike."""
    return float(np.mean([r.mean("acc") for b in blocks for r in b.rows if r.label == label]))


def about(ranks: Ranks) -> str:
    """What the reader of the table must know."""
    N = len(ranks.streams)
    p = "< 0.001" if ranks.p < 0.001 else f"= {ranks.p:.3f}"
    p = "is not defined, all ranks are shared" if math.isnan(ranks.p) else p
    told = "one row is told from another" if ranks.p < LEVEL else "no row is told from another"
    few = f"; {N} streams are few for this test" if N < FEW else ""
    return (
        f"percent, ACC on each stream; Friedman's test over {N} streams: p {p}, {told}{few}; "
        f"Nemenyi's critical difference at 5 %: mean ranks less than {ranks.critical:.2f} apart "
        "are not told apart"
    )


def rank_cells(ranks: Ranks, digits: int = 1) -> tuple[list[str], Sequence[Sequence[str]]]:
    """Header and rows as text."""
    lines = [
        [label, f"{rank:.2f}", *(f"{100 * score:.{digits}f}" for score in scores)]
        for label, rank, scores in zip(ranks.labels, ranks.ranks, ranks.scores.T, strict=True)
    ]
    return ["strategy", "mean rank", *ranks.streams], lines
