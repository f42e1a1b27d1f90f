"""Rank correlations across the experts of a layer, with intervals over documents and over experts drawn anew.

Everything is a function of sums per document and expert, so a draw of documents is a product with how often each was
drawn, and many draws are one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy import special
from scipy.stats import rankdata

from moe_lens.audit.metric_statistics import ClusteredMeans

PAIRS = (
    ("routing_weight", "gap_norm", ""),
    ("gap_norm", "relative_compensation", ""),
    ("routing_weight", "relative_compensation", ""),
    ("routing_weight", "relative_compensation", "gap_norm"),
    ("gap_norm", "delta_loss", ""),
    ("routing_weight", "delta_loss", ""),
)
"""What is correlated, and given what; those with `delta_loss` where there is a census."""

FEWEST_EXPERTS = 4
"""For a correlation. A partial one of three experts is 1 or -1 whatever they are."""

COLUMNS: Mapping[str, Any] = {
    "layer": np.int64,
    "x": str,
    "y": str,
    "given": str,
    "rho": np.float64,
    "p": np.float64,
    "n_experts": np.int64,
    "low": np.float64,
    "high": np.float64,
    "n_draws": np.int64,
    "low_experts": np.float64,
    "high_experts": np.float64,
    "n_draws_experts": np.int64,
    "mean_gap_norm": np.float64,
}
"""Of the correlations, with their types."""

# Draws at a time, and how often documents come in them.
_DRAWS = 1024
_CHUNK = 2**22


@dataclass(frozen=True, eq=False)
class PerDocument:
    """A quantity at one layer, summed over the tokens of each document that have it.

    Attributes:
        sums: float64.
        counts: of those tokens, float64.
    """

    sums: Float[np.ndarray, "document expert"]
    counts: Float[np.ndarray, "document expert"]

    def estimates(self) -> tuple[Float[np.ndarray, " expert"], Float[np.ndarray, " expert"]]:
        """Means over tokens, NaN without one; standard errors clustered by document, NaN for fewer than two."""
        means = ClusteredMeans(1, self.sums.shape[1], torch.device("cpu"))
        # Copies, because torch may not write to what these are views of.
        means.add(torch.tensor(self.sums)[None], torch.tensor(self.counts))
        value, error = means.estimates()
        return value[0].numpy(), error[0].numpy()

    def means_of(self, times: Float[np.ndarray, "draw document"]) -> Float[np.ndarray, "draw expert"]:
        """The means if every document came so many times; NaN where an expert has no token then."""
        counts = times @ self.counts
        return np.divide(times @ self.sums, counts, out=np.full_like(counts, np.nan), where=counts > 0)


# ---- per expert ----


def experts_of(layer: int, quantities: Mapping[str, PerDocument]) -> pd.DataFrame:
    """The layer's rows of `Redistribution.experts`."""
    active = quantities["routing_weight"].counts
    n_tokens = active.sum(axis=0)
    columns: dict[str, Any] = {
        "layer": layer,
        "expert": np.arange(active.shape[1]),
        "n_tokens": n_tokens.astype(np.int64),
        "n_documents": (active > 0).sum(axis=0),
        "n_undefined": (n_tokens - quantities["cosine"].counts.sum(axis=0)).astype(np.int64),
        "n_zero_gap": (n_tokens - quantities["relative_compensation"].counts.sum(axis=0)).astype(np.int64),
    }
    for name, quantity in quantities.items():
        columns[name], columns[f"{name}_standard_error"] = quantity.estimates()
    if "delta_loss" in quantities:
        columns["n_rows"] = quantities["delta_loss"].counts.sum(axis=0).astype(np.int64)
    return pd.DataFrame(columns)


# ---- across experts ----


def spearman(
    x: Float[np.ndarray, "draw expert"],
    y: Float[np.ndarray, "draw expert"],
    given: Float[np.ndarray, "draw expert"] | None = None,
) -> tuple[Float[np.ndarray, " draw"], Int[np.ndarray, " draw"]]:
    """Spearman's rho of every row, over the experts that have all values (NaN stands for none), and their number.

    Ties share their mean rank. With `given`, the partial rho: Pearson's partial correlation of the ranks,
    (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2) (1 - r_yz^2)) (Kendall and Stuart 1973, The advanced theory of statistics,
    volume 2, chapter 27). NaN for fewer than `FEWEST_EXPERTS`, where x or y does not vary, and where one of them is
    ordered as `given` is, or the other way round. If `given` does not vary, there is nothing to hold fixed, and that
    is NaN too.
    """
    there = ~(np.isnan(x) | np.isnan(y))
    if given is not None:
        there &= ~np.isnan(given)
    n = there.sum(axis=1)
    ranks_x, ranks_y = _centred_ranks(x, there, n), _centred_ranks(y, there, n)
    rho = _cosine(ranks_x, ranks_y)
    if given is not None:
        ranks_given = _centred_ranks(given, there, n)
        with_x, with_y = _cosine(ranks_x, ranks_given), _cosine(ranks_y, ranks_given)
        left = (1 - with_x**2) * (1 - with_y**2)
        partial = np.full_like(rho, np.nan)
        np.divide(rho - with_x * with_y, np.sqrt(left), out=partial, where=left > 0)
        rho = np.clip(partial, -1, 1)  # by rounding alone it is ever beyond
    return np.where(n < FEWEST_EXPERTS, np.nan, rho), n


def _centred_ranks(
    values: Float[np.ndarray, "draw expert"], there: np.ndarray, n: np.ndarray
) -> Float[np.ndarray, "draw expert"]:
    """Ranks among those that are there, less their mean; 0 elsewhere. Multiples of 1/2, and so exact."""
    ranks = rankdata(np.where(there, values, np.inf), axis=1)
    return np.where(there, ranks - (n[:, None] + 1) / 2, 0.0)


def _cosine(
    x: Float[np.ndarray, "draw expert"], y: Float[np.ndarray, "draw expert"]
) -> Float[np.ndarray, " draw"]:
    """1 or -1 exactly where the ranks are the same or reversed; NaN where there is no variation."""
    size = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    return np.divide((x * y).sum(axis=1), size, out=np.full_like(size, np.nan), where=size > 0)


def p_value(rho: float, n: int, n_given: int = 0) -> float:
    """Two-sided, of t = rho sqrt(df / (1 - rho^2)) with df = n - 2 - n_given. NaN where rho is.

    As the incomplete beta function of 1 - rho^2, which is 0 for rho = 1, without a division.
    """
    return float(special.betainc((n - 2 - n_given) / 2, 0.5, (1 - rho) * (1 + rho)))


def correlations_of(
    quantities: Mapping[int, Mapping[str, PerDocument]], n_bootstrap: int, confidence: float, seed: int
) -> pd.DataFrame:
    """The rows of `Redistribution.correlations`.

    Args:
        quantities: of each layer, by name, all over the same documents.
    """
    asked = [
        (layer, pair) for layer, of in quantities.items() for pair in PAIRS if pair[0] in of and pair[1] in of
    ]
    means = {layer: {name: q.estimates()[0] for name, q in of.items()} for layer, of in quantities.items()}
    drawn = _over_documents(quantities, asked, n_bootstrap, seed)
    lines = []
    for (layer, (x, y, given)), of_documents in zip(asked, drawn, strict=True):
        of = means[layer]
        held = of[given][None] if given else None
        rho, n = (found[0] for found in spearman(of[x][None], of[y][None], held))
        values = np.stack([of[x], of[y], *([of[given]] if given else [])])
        of_experts = _over_experts(values[:, ~np.isnan(values).any(axis=0)], n_bootstrap, seed)
        gaps = of["gap_norm"]
        low, high = _interval(rho, of_documents, confidence)
        low_experts, high_experts = _interval(rho, of_experts, confidence)
        lines.append(
            {
                "layer": layer,
                "x": x,
                "y": y,
                "given": given,
                "rho": rho,
                "p": p_value(rho, int(n), 1 if given else 0),
                "n_experts": n,
                "low": low,
                "high": high,
                "n_draws": (~np.isnan(of_documents)).sum(),
                "low_experts": low_experts,
                "high_experts": high_experts,
                "n_draws_experts": (~np.isnan(of_experts)).sum(),
                "mean_gap_norm": gaps[~np.isnan(gaps)].mean() if (~np.isnan(gaps)).any() else np.nan,
            }
        )
    return pd.DataFrame(lines, columns=list(COLUMNS)).astype(COLUMNS)


# ---- draws ----


def document_draws(
    n_documents: int, n_bootstrap: int, seed: int
) -> Iterator[Float[np.ndarray, "draw document"]]:
    """How often each document comes in each draw of as many as there are, a few draws at a time."""
    rng = np.random.default_rng([seed, 0])
    for n_draws in _in_chunks(n_bootstrap, n_documents):
        yield rng.multinomial(n_documents, np.full(n_documents, 1 / n_documents), size=n_draws).astype(float)


def expert_draws(n_experts: int, n_bootstrap: int, seed: int) -> Iterator[Int[np.ndarray, "draw expert"]]:
    """Which experts come in each draw of as many as there are, a few draws at a time."""
    rng = np.random.default_rng([seed, 1])
    for n_draws in _in_chunks(n_bootstrap, n_experts):
        yield rng.integers(n_experts, size=(n_draws, n_experts))


def _in_chunks(n_bootstrap: int, width: int) -> Iterator[int]:
    largest = max(1, min(_DRAWS, _CHUNK // max(1, width)))
    for start in range(0, n_bootstrap, largest):
        yield min(largest, n_bootstrap - start)


def _over_documents(
    quantities: Mapping[int, Mapping[str, PerDocument]],
    asked: list[tuple[int, tuple[str, str, str]]],
    n_bootstrap: int,
    seed: int,
) -> list[Float[np.ndarray, " draw"]]:
    """The rho of every draw, for each correlation. None for fewer than two documents, which are always the same."""
    found: list[list[np.ndarray]] = [[np.zeros(0)] for _ in asked]
    n_documents = len(next(iter(next(iter(quantities.values())).values())).sums)
    for times in document_draws(n_documents, n_bootstrap if n_documents > 1 else 0, seed):
        for layer, of in quantities.items():
            means = {name: quantity.means_of(times) for name, quantity in of.items()}
            for rhos, (of_layer, (x, y, given)) in zip(found, asked, strict=True):
                if of_layer == layer:
                    rhos.append(spearman(means[x], means[y], means[given] if given else None)[0])
    return [np.concatenate(rhos) for rhos in found]


def _over_experts(
    values: Float[np.ndarray, "quantity expert"], n_bootstrap: int, seed: int
) -> Float[np.ndarray, " draw"]:
    """The rho of every draw of experts, all of which have values."""
    n_experts = values.shape[1]
    rhos = [np.zeros(0)]
    for experts in expert_draws(n_experts, n_bootstrap if n_experts >= FEWEST_EXPERTS else 0, seed):
        rhos.append(spearman(*values[:, experts])[0])
    return np.concatenate(rhos)


def _interval(rho: float, draws: Float[np.ndarray, " draw"], confidence: float) -> tuple[float, float]:
    """Percentiles of the draws. NaN where there are none, or no rho.

    A draw without a rho is -1 for the low end and 1 for the high one. Left out, it would make an interval of the draws
    that happen to have one: of a partial rho, those in which the orders differ most.
    """
    if len(draws) == 0 or np.isnan(rho):
        return np.nan, np.nan
    tail, none = 50 * (1 - confidence), np.isnan(draws)
    low = np.percentile(np.where(none, -1, draws), tail)
    high = np.percentile(np.where(none, 1, draws), 100 - tail)
    return float(low), float(high)
