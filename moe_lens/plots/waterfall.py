"""A waterfall: the signed parts of one decision, up to their total."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import plotly.graph_objects as go

from moe_lens.plots.style import (
    GREY,
    INK,
    MUTED,
    NEGATIVE,
    POSITIVE,
    lay_out,
    lay_out_chart,
    layout_of,
    literal,
)

_TOLERANCE = 1e-3
"""Of the sum of all sizes: what a total may differ by, being summed in another order and precision."""


def waterfall(
    labels: Sequence[str],
    values: Sequence[float] | np.ndarray,
    *,
    total: float,
    title: str,
    threshold: float | None = None,
    unit: str = "logits",
    n: int = 15,
    order: Literal["size", "given"] = "size",
    other_label: str = "all others",
    threshold_label: str = "threshold",
    total_label: str = "total",
) -> go.Figure:
    """Signed parts, the largest first, from zero to their total: red adds, blue takes away.

    Args:
        labels, values: every part; those that are not shown are merged into one bar, which says how many they are.
        total: what they sum to.
        title, labels, unit, other_label, threshold_label, total_label: shown literally.
        threshold: a dashed line, at the score that had to be passed, say.
        n: how many parts are shown, the largest by size.
        order: `size`, or as `given` (the order in which the stream adds them, say).

    Raises:
        ValueError: lengths that differ; a value that is not finite; parts that do not sum to the total; n is not
            positive; another order.
    """
    parts = np.asarray(values, dtype=float)
    if parts.ndim != 1 or len(parts) != len(labels):
        raise ValueError(f"there are {len(labels)} labels and values of shape {parts.shape}")
    if not (np.isfinite(parts).all() and np.isfinite(total)):
        raise ValueError("every value, and the total, must be finite")
    if n < 1:
        raise ValueError(f"n={n} must be positive")
    if order not in ("size", "given"):
        raise ValueError(f"order must be size or given, not {order!r}")
    if abs(parts.sum() - total) > _TOLERANCE * max(np.abs(parts).sum(), abs(total)):
        raise ValueError(
            f"the values sum to {parts.sum():.6g}, not to the total {total:.6g}: give every part; those that are not "
            f"shown are merged"
        )
    shown = np.argsort(-np.abs(parts), kind="stable")[:n]
    if order == "given":
        shown = np.sort(shown)
    rest = np.setdiff1d(np.arange(len(parts)), shown)
    names = [literal(labels[i]) for i in shown]
    steps = [float(parts[i]) for i in shown]
    if len(rest):
        names.append(f"{literal(other_label)} ({len(rest):,})")
        steps.append(float(parts[rest].sum()))
    names.append(literal(total_label))
    unit = literal(unit)
    figure = go.Figure(
        go.Waterfall(
            orientation="h",
            # Two parts may have one label, so bars stand at numbers.
            y=list(range(len(names))),
            x=[*steps, float(total)],
            measure=["relative"] * len(steps) + ["total"],
            text=[f"{step:+.3g}".replace("-", "−") for step in [*steps, float(total)]],
            textposition="outside",
            textfont=dict(size=11, color=MUTED),
            cliponaxis=False,
            customdata=names,
            hovertemplate="%{customdata}<br>%{text} " + unit + "<extra></extra>",
            increasing=dict(marker=dict(color=POSITIVE)),
            decreasing=dict(marker=dict(color=NEGATIVE)),
            totals=dict(marker=dict(color=INK)),
            connector=dict(line=dict(color=GREY, width=1)),
        )
    )
    lay_out(figure, literal(title), unit, "", n_rows=len(names))
    lay_out_chart(figure)
    ends = np.concatenate([[0.0], np.cumsum(steps), [total], [] if threshold is None else [threshold]])
    pad = 0.09 * max(float(np.ptp(ends)), 1e-12)
    figure.update_xaxes(
        range=[float(ends.min()) - pad, float(ends.max()) + pad], zeroline=True, zerolinecolor=MUTED
    )
    figure.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=names,
        range=[len(names) - 0.4, -0.6],
        showgrid=False,
        automargin=True,
        tickfont_color=INK,
    )
    if threshold is not None:
        figure.add_vline(x=threshold, line=dict(color=INK, width=1.2, dash="dash"))
        figure.add_annotation(
            x=threshold,
            xref="x",
            y=1,
            yref="paper",
            yanchor="bottom",
            text=f"{literal(threshold_label)}: " + f"{threshold:.3g}".replace("-", "−"),
            showarrow=False,
            font=dict(size=11, color=INK),
        )
        figure.update_layout(margin_t=60, height=layout_of(figure).height + 16)
    return figure
