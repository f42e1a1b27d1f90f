"""Which metric do the ablations of a layer support, and is it any? Posterior odds over metrics and the empty model.

A null test measures evidence against one metric. Here the metrics compete. For each of them, the change of the loss is
regressed on where the metric places the expert among those active at the token, with an effect per document:

    delta_loss_i = a_document(i) + b rank_i + e_i

rank being -1/2 for the token's lowest expert, 0 in the middle and 1/2 for its highest, so that b is the difference
between highest and lowest in nats. The empty model has b = 0. With R^2 the share of the variance within documents that
the rank explains, and n rows, the difference of two BICs approximates the Bayes factor under a prior that is worth one
row (Schwarz 1978, Annals of Statistics 6, 461-464; Kass and Raftery 1995, Bayes factors, JASA 90, 773-795; Raftery
1995, Bayesian model selection in social research, Sociological Methodology 25, 111-163):

    log BF(metric, empty) = (BIC_empty - BIC_metric) / 2 = -n / 2 log(1 - R^2) - log(n) / 2

Rows of a document are not independent, and a metric's slope may differ between documents, so n rows say less than this.
Both n are therefore divided by a design effect, the clustered variance of b (Cameron and Miller 2015) over its ordinary
one: a composite likelihood, tempered to what its rows are worth (Lumley and Scott 2015, AIC and BIC for modeling with
complex survey data, Journal of Survey Statistics and Methodology 3, 1-18). The likelihood must be one and the same for
all models, or their odds would mean nothing, so there is one design effect for a layer: the largest of the metrics',
and at least 1. What ordering there is between metrics is that of R^2; the design effect says how sure one may be of it.

All models are equally likely to start with. Metrics that rank alike share what they get.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy.special import logsumexp

EMPTY = "empty"
"""The name of the model without a metric."""


@dataclass(frozen=True)
class MetricComparison:
    """Attributes:
    table: a row per model, the empty one first, then the metrics as given: `metric`; `slope`, nats from the token's
        lowest expert to its highest, and `standard_error`, clustered (infinite where the metric ties at every token);
        `r_squared`, within documents; `log_bayes_factor` against the empty model, natural; `posterior`, sums to 1;
        `log_bayes_factor_independent`, what it would be if rows were independent.
    n_rows: of the layer: (token, expert).
    n_documents: that they come from.
    design_effect: rows per independent row, the largest among the metrics.
    n_effective: n_rows / design_effect, at least 1.
    """

    table: pd.DataFrame
    n_rows: int
    n_documents: int
    design_effect: float
    n_effective: float


def within_token_rank(values: ArrayLike, token: ArrayLike) -> Float[np.ndarray, " row"]:
    """Where each row's value stands among those of its token: (rank - (K + 1) / 2) / (K - 1), from -1/2 for the lowest
    of K to 1/2 for the highest. Equal values share their mean rank; a row alone has 0.

    Args:
        values: [row] of a metric, each the active expert's.
        token: [row] integers, a different one for each (document, position).

    Raises:
        ValueError: lengths differ, or a value is NaN.
    """
    metric, tokens = np.asarray(values, dtype=np.float64), np.asarray(token)
    if metric.ndim != 1 or metric.shape != tokens.shape:
        raise ValueError(
            f"values and tokens are one per row, not of the shapes {metric.shape}, {tokens.shape}"
        )
    if np.isnan(metric).any():
        raise ValueError(f"the metric is NaN at row {np.flatnonzero(np.isnan(metric))[0]}")
    n = len(metric)
    if n == 0:
        return metric
    order = np.lexsort((metric, tokens))
    metric, tokens = metric[order], tokens[order]
    new_token = np.concatenate([[True], tokens[1:] != tokens[:-1]])
    first, size = _runs(new_token)
    first_equal, equal = _runs(new_token | np.concatenate([[True], metric[1:] != metric[:-1]]))
    # Counted from 0: the mean place of equal values, from the middle of the token's.
    place = first_equal - first + (equal - 1) / 2 - (size - 1) / 2
    ranks = np.empty(n)
    ranks[order] = place / np.maximum(size - 1, 1)
    return ranks


def _runs(starts: np.ndarray) -> tuple[Int[np.ndarray, " row"], Int[np.ndarray, " row"]]:
    """For each row, where its run starts and how long it is."""
    first = np.flatnonzero(starts)
    sizes = np.diff(first, append=len(starts))
    return np.repeat(first, sizes), np.repeat(sizes, sizes)


def compare_metrics(
    delta_loss: ArrayLike, ranks: Mapping[str, ArrayLike], document: ArrayLike
) -> MetricComparison:
    """Posterior odds over the metrics and the empty model, for the rows of one layer. See the module.

    A metric that ties at every token has slope 0 and is charged for it. Where delta_loss does not vary within
    documents, every slope is 0.

    Args:
        delta_loss: [row] nats, one row per active routed expert of a token.
        ranks: for each metric, [row] from `within_token_rank`.
        document: [row] labels of any kind.

    Raises:
        ValueError: no metric, or one named "empty"; lengths differ; a value is NaN or infinite, or a label missing;
            a single document; not more rows than documents + 1.
    """
    if not ranks:
        raise ValueError("there is no metric to compare")
    if EMPTY in ranks:
        raise ValueError(f"{EMPTY!r} is the model without a metric; name the metric otherwise")
    labels = np.asarray(document)
    loss = _column("delta_loss", delta_loss, labels.shape)
    codes, names = pd.factorize(labels)
    if (codes < 0).any():
        raise ValueError(f"document misses the label of row {np.flatnonzero(codes < 0)[0]}")
    n, n_documents = len(loss), len(names)
    if n_documents < 2 or n <= n_documents + 1:
        raise ValueError(
            f"comparing metrics needs two documents and more rows than documents + 1, and got {n} rows "
            f"of {n_documents} documents"
        )
    sizes = np.bincount(codes)
    y = _without_documents(loss, codes, sizes)
    total = float(y @ y)
    lines = [{"metric": EMPTY, "slope": 0.0, "standard_error": 0.0, "r_squared": 0.0}]
    design_effect = 1.0
    for name, values in ranks.items():
        x = _without_documents(_column(name, values, labels.shape), codes, sizes)
        spread = float(x @ x)
        line = {"metric": name, "slope": 0.0, "standard_error": math.inf, "r_squared": 0.0}
        if spread > 0:
            slope = float(x @ y) / spread if total > 0 else 0.0
            residual = y - slope * x
            rest = float(residual @ residual)
            scores = np.bincount(codes, x * residual)
            variance = n_documents / (n_documents - 1) * float(scores @ scores) / spread**2
            ordinary = rest / (n - n_documents - 1) / spread
            if rest > 1e-24 * total:
                design_effect = max(design_effect, variance / ordinary)
            explained = slope**2 * spread / total if total > 0 else 0.0
            # A metric that leaves nothing unexplained leaves rounding.
            line |= {
                "slope": slope,
                "standard_error": math.sqrt(variance),
                "r_squared": min(explained, 1 - 1e-15),
            }
        lines.append(line)
    n_effective = max(n / design_effect, 1.0)
    table = pd.DataFrame(lines)
    r_squared = table["r_squared"].to_numpy()
    table["log_bayes_factor"] = _log_bayes_factors(r_squared, n_effective)
    table["posterior"] = np.exp(table["log_bayes_factor"] - logsumexp(table["log_bayes_factor"]))
    table["log_bayes_factor_independent"] = _log_bayes_factors(r_squared, n)
    return MetricComparison(table, n, n_documents, design_effect, n_effective)


def _log_bayes_factors(r_squared: Float[np.ndarray, " model"], n: float) -> Float[np.ndarray, " model"]:
    """Against the empty model, which is the first."""
    against = -n / 2 * np.log1p(-r_squared) - math.log(n) / 2
    against[0] = 0.0
    return against


def _column(name: str, values: ArrayLike, shape: tuple[int, ...]) -> Float[np.ndarray, " row"]:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or column.shape != shape:
        raise ValueError(
            f"{name} has one value per row, as document has, not the shapes {column.shape}, {shape}"
        )
    if not np.isfinite(column).all():
        raise ValueError(f"{name} is NaN or infinite at row {np.flatnonzero(~np.isfinite(column))[0]}")
    return column


def _without_documents(
    values: Float[np.ndarray, " row"], codes: Int[np.ndarray, " row"], sizes: Int[np.ndarray, " document"]
) -> Float[np.ndarray, " row"]:
    """What is left without each document's mean; exactly zero where that is only rounding."""
    left = values - (np.bincount(codes, values) / sizes)[codes]
    left[np.abs(left) <= 1e-14 * np.abs(values).max(initial=0)] = 0
    return left
