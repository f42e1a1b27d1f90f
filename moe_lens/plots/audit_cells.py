"""Cells of audits, as their figures share them: what is chosen, what a cell says, the range of all metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool

from moe_lens.audit.audit_result import Audit
from moe_lens.plots.labelled import counted, labelled
from moe_lens.plots.style import literal

Cells = Audit | pd.DataFrame | Sequence[Audit]
"""An `Audit`, its `cells` (with a column `label` where the model's name is not to be shown), or several Audits."""

KEY = ("family", "metric", "layer")
NEEDED = (*KEY, "d", "d_low", "d_high", "p_t_holm", "p_wilcoxon_holm", "n_pairs", "n_documents", "verdict")
D_TITLE = "d (Cohen's, of paired differences of the loss)"


def cells_of(cells: Cells) -> pd.DataFrame:
    """Of one model or several, with a column `label`.

    Raises:
        ValueError: see `labelled`.
    """
    return labelled(cells, "cells", NEEDED, KEY, "an Audit, its cells or a sequence of Audits")


def names_of(metrics: Sequence[str] | str) -> list[str]:
    return [metrics] if isinstance(metrics, str) else list(metrics)


def chosen_rows(
    frame: pd.DataFrame, column: Literal["layer", "metric"], wanted: Sequence[Any]
) -> Bool[np.ndarray, " row"]:
    """Which rows have one of these.

    Raises:
        ValueError: none is asked for, or no row has one of them.
    """
    there = list(frame[column].unique())
    if not wanted:
        raise ValueError(f"no {column} is asked for; there are {', '.join(map(str, there))}")
    for name in wanted:
        if name not in there:
            raise ValueError(f"there is no {column} {name!r}; there are {', '.join(map(str, there))}")
    return np.isin(frame[column].to_numpy(), list(wanted))


def metric_range(frame: pd.DataFrame) -> tuple[float, float] | None:
    """Smallest and largest d of all cells of metrics, of all models; None where there is none."""
    values = frame.loc[frame["family"] == "metrics", "d"].to_numpy(float)
    values = values[~np.isnan(values)]
    return (float(values.min()), float(values.max())) if values.size else None


def hover_of(rows: pd.DataFrame) -> list[str]:
    """What a cell says: its place, its effect, tests and verdict, how many it is of, and its row in the table."""
    texts = []
    for index, row in zip(rows.index, rows.to_dict("records"), strict=True):
        lines = [
            f"{literal(row['metric'])}, M{row['layer']}"
            + (f", {literal(row['label'])}" if row["label"] else ""),
            f"d = {with_interval(row['d'], row['d_low'], row['d_high'])}",
            f"{literal(row['verdict'])}; p (Holm) {row['p_t_holm']:.2g} by t, {row['p_wilcoxon_holm']:.2g} by ranks",
            f"{counted(int(row['n_pairs']), 'pair')} in {counted(int(row['n_documents']), 'document')}",
            f"row {literal(index)}",
        ]
        texts.append("<br>".join(lines))
    return texts


def with_interval(value: float, low: float, high: float) -> str:
    return f"{value:+.3f} ({low:+.3f} to {high:+.3f})".replace("-", "−")
