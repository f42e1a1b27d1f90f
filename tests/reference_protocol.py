"""The slow, obvious audit: positions one at a time, experts sorted with Python's sort. No statistics of the package.

`pairs_of` is the protocol's pairs, `beyond_of` the rest; `clustered` is the error of a mean over positions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
from scipy import stats

Values = Callable[[Any], float]
"""The metric of a row of the census."""


class Reference(NamedTuple):
    """What the pairs of a cell are, in the order of the census."""

    documents: list[int]
    high: list[float]
    low: list[float]
    ratio: list[float]
    n_positions: int
    n_undefined: int
    n_ties: int


def positions_of(frame: pd.DataFrame, layer: int) -> list[list[Any]]:
    """The routed experts' rows at each position."""
    found = defaultdict(list)
    for row in frame.itertuples():
        if row.layer == layer and row.expert >= 0:
            found[row.document, row.position].append(row)
    return [found[key] for key in sorted(found)]


def pairs_of(positions: Sequence[Sequence[Any]], metric: Values, compare: int = 1) -> Reference:
    documents, high, low, ratio = [], [], [], []
    n_undefined = n_ties = 0
    for rows in positions:
        if any(math.isnan(metric(row)) for row in rows):
            n_undefined += 1
            continue
        ordered = sorted(rows, key=metric)
        lowest, highest = ordered[:compare], ordered[-compare:]
        next_lowest, next_highest = ordered[compare], ordered[-compare - 1]
        if metric(lowest[-1]) == metric(next_lowest) or metric(highest[0]) == metric(next_highest):
            n_ties += 1
            continue
        documents.append(rows[0].document)
        high.append(sum(float(row.delta_loss) for row in highest) / compare)
        low.append(sum(float(row.delta_loss) for row in lowest) / compare)
        below = sum(metric(row) for row in lowest)
        ratio.append(sum(metric(row) for row in highest) / below if below else math.inf)
    return Reference(documents, high, low, ratio, len(positions), n_undefined, n_ties)


def beyond_of(positions: Sequence[Sequence[Any]], metric: Values) -> Mapping[str, Any]:
    spearman, kendall, correlated = [], [], []
    gains, documents, of_random, of_lowest, of_best = [], [], [], [], []
    for rows in positions:
        values = [metric(row) for row in rows]
        losses = [float(row.delta_loss) for row in rows]
        if any(map(math.isnan, values)):
            continue
        if len(set(values)) > 1 and len(set(losses)) > 1:
            spearman.append(float(stats.spearmanr(values, losses).statistic))
            kendall.append(float(stats.kendalltau(values, losses).statistic))
            correlated.append(rows[0].document)
        lowest = [loss for value, loss in zip(values, losses, strict=True) if value == min(values)]
        of_lowest.append(sum(lowest) / len(lowest))
        of_random.append(sum(losses) / len(losses))
        of_best.append(min(losses))
        gains.append(of_random[-1] - of_lowest[-1])
        documents.append(rows[0].document)
    found = {"n_correlations": len(spearman)}
    for name, values, clusters in (
        ("spearman", spearman, correlated),
        ("kendall", kendall, correlated),
        ("pruning_gain", gains, documents),
    ):
        found[name], found[f"{name}_standard_error"] = clustered(values, clusters)
    for name, values in (("random", of_random), ("lowest", of_lowest), ("best", of_best)):
        found[f"{name}_delta_loss"] = mean_of(values)
    return found


def mean_of(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def clustered(values: Sequence[float], clusters: Sequence[int]) -> tuple[float, float]:
    """The mean, and its error with every document's deviations summed first."""
    mean = mean_of(values)
    sums: dict[int, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - mean
    n = len(sums)
    if n < 2:
        return mean, math.nan
    return mean, math.sqrt(n / (n - 1) * sum(s**2 for s in sums.values())) / len(values)
