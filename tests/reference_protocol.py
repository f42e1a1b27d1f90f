"""The slow, obvious audit: positions one at a time, experts sorted with Python's sort. No statistics of the package.

`pairs_of` is the protocol's pairs, `beyond_of` the rest, `odds_of` the comparison between metrics, by regressions with
a column per document; `clustered` is the error of a mean over positions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
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


def odds_of(
    positions: Sequence[Sequence[Any]], metrics: Mapping[str, Values]
) -> Mapping[str, Mapping[str, float]]:
    """For each metric the columns of the comparison, of positions at which all of them have values."""
    kept = [
        rows for rows in positions if not any(math.isnan(m(row)) for m in metrics.values() for row in rows)
    ]
    losses = np.array([float(row.delta_loss) for rows in kept for row in rows])
    of_row = [row.document for rows in kept for row in rows]
    documents = sorted(set(of_row))
    columns = np.array([[float(document == one) for one in documents] for document in of_row])
    n, bic_empty = len(losses), 0.0
    fits: dict[str, dict[str, float]] = {}
    effects = [1.0]
    empty = residuals_of(columns, losses)[1]
    for name, metric in metrics.items():
        ranks = np.array(
            [(r - (len(rows) + 1) / 2) / (len(rows) - 1) for rows in kept
             for r in stats.rankdata([metric(row) for row in rows])]
        )  # fmt: skip
        if not ranks.any():
            fits[name] = {"rank_slope": 0.0, "rank_slope_standard_error": math.inf, "rank_r_squared": 0.0}
            continue
        slopes, residuals = residuals_of(np.column_stack([ranks, columns]), losses)
        bread = sum(ranks**2)
        sums = [sum((ranks * residuals)[np.array(of_row) == one]) for one in documents]
        variance = len(documents) / (len(documents) - 1) * sum(s**2 for s in sums) / bread**2
        effects.append(variance / (sum(residuals**2) / (n - len(documents) - 1) / bread))
        fits[name] = {
            "rank_slope": slopes[0],
            "rank_slope_standard_error": math.sqrt(variance),
            "rank_r_squared": 1 - sum(residuals**2) / sum(empty**2),
        }
    n_effective = max(n / max(effects), 1.0)
    for fit in fits.values():
        # The columns of the documents are parameters of both models.
        bic_metric = n_effective * math.log(1 - fit["rank_r_squared"]) + math.log(n_effective)
        fit["log_odds"] = (bic_empty - bic_metric) / 2
    total = 1 + sum(math.exp(fit["log_odds"]) for fit in fits.values())
    for fit in fits.values():
        fit["posterior"] = math.exp(fit["log_odds"]) / total
        fit["posterior_empty"] = 1 / total
        fit["odds_design_effect"] = max(effects)
        fit["n_odds_rows"] = n
    return fits


def residuals_of(columns: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares: coefficients, and what they leave."""
    coefficients = np.linalg.lstsq(columns, losses, rcond=None)[0]
    return coefficients, losses - columns @ coefficients


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
