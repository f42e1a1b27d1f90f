"""Means of a census over the rows of a layer, or of a rank of it, with errors that know of documents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from moe_lens.audit.census_rows import Columns

_AVERAGED = ("delta_loss", "gap_norm", "routing_weight")
_PERCENTILES = {"median": 50, "p5": 5, "p95": 95}
SUMMARISED = ("document", "rank", *_AVERAGED)
"""The columns that `summary` reads."""
_SUMMARY = (
    "n_rows",
    "n_documents",
    "delta_loss",
    "delta_loss_standard_error",
    *(f"delta_loss_{point}" for point in _PERCENTILES),
    "gap_norm",
    "gap_norm_standard_error",
    "routing_weight",
    "routing_weight_standard_error",
)


def summary(layers: Iterable[tuple[int, Columns]], *, by_rank: bool) -> pd.DataFrame:
    """See `Census.by_layer` and `by_rank`.

    Args:
        layers: each with its rows, a document after the other.
    """
    lines: list[dict[str, Any]] = []
    for layer, rows in layers:
        if by_rank:
            ranks = np.unique(rows["rank"]).tolist()
            groups = [({"layer": layer, "rank": rank}, rows["rank"] == rank) for rank in ranks]
        else:
            groups = [({"layer": layer}, rows["rank"] > 0)]
        lines += [group | _summary_of(rows, chosen) for group, chosen in groups if chosen.any()]
    return pd.DataFrame(lines, columns=["layer", *(["rank"] if by_rank else []), *_SUMMARY])


def _summary_of(rows: Columns, chosen: Bool[np.ndarray, " row"]) -> dict[str, Any]:
    """Of the chosen rows of a layer, a document after the other."""
    starts = np.unique(rows["document"][chosen], return_index=True)[1]
    line: dict[str, Any] = {"n_rows": int(chosen.sum()), "n_documents": len(starts)}
    for name in _AVERAGED:
        values = rows[name][chosen].astype(np.float64)
        line[name], line[f"{name}_standard_error"] = clustered_mean(values, starts)
        if name == "delta_loss":
            points = np.percentile(values, [*_PERCENTILES.values()])
            line |= {f"{name}_{point}": value for point, value in zip(_PERCENTILES, points, strict=True)}
    return line


def clustered_mean(
    values: Float[np.ndarray, " row"], starts: Int[np.ndarray, " document"]
) -> tuple[float, float]:
    """The mean over rows, and its standard error where the rows of a document, from its start to the next, may go
    together in any way."""
    mean, n_documents = values.mean(), len(starts)
    if n_documents < 2:
        return float(mean), np.nan
    deviations = np.add.reduceat(values - mean, starts)
    variance = n_documents / (n_documents - 1) * np.square(deviations).sum() / len(values) ** 2
    return float(mean), float(np.sqrt(variance))
