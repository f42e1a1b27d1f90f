"""Figures of routing, as plotly figures: stripes of sender on receiver, and expert load.

Blank cells have no value: the sender comes after the receiver. No name of a document or model goes into a
figure, because plotly reads markup in its text.
"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from moe_lens.routing.contributions import RoutingContributions
from moe_lens.routing.load import ExpertLoad

FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, sans-serif"
INK, MUTED, GRID, BLANK = "#1f2933", "#61707f", "#e3e8ee", "#f4f6f8"

# Light to dark, one hue, and blue through near-white to red: both keep their order in grey, and for the colour-blind.
SEQUENTIAL = [[0.0, "#f3f7fb"], [0.25, "#c3d9ec"], [0.5, "#7fb0d6"], [0.75, "#3577b1"], [1.0, "#0b3c6f"]]
DIVERGING = [[0.0, "#1c5a9a"], [0.25, "#86b4d8"], [0.5, "#f8f8f7"], [0.75, "#e8967a"], [1.0, "#a8231c"]]

MEASURE_NAMES = {
    "variance": "Variance over experts",
    "aps": "Average positive score (APS)",
    "ans": "Average negative score (ANS)",
}
UNITS = {"variance": "logits²", "aps": "logits", "ans": "logits"}
POSITION_NAMES = {"lead": "lead token", "rest": "all other tokens"}


def stripes(contributions: RoutingContributions, measure: str, position: str = "rest") -> go.Figure:
    """A heatmap of one measure: each column a sender, each row a router that reads it.

    A sender that shapes many later routers shows as a vertical stripe. Variance has a sequential scale from 0;
    APS and ANS share one that is centred on zero, so that their colours compare.

    Args:
        measure: `variance` (logits^2), `aps` or `ans` (logits).
        position: `lead`, the first token of each document, or `rest`.

    Raises:
        ValueError: another measure or position.

    Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), whose
    figures show these measures.
    """
    values = contributions.measure(measure)
    if position not in values:
        raise ValueError(f"position must be one of {', '.join(values)}, not {position!r}")
    cells = values[position].T
    errors = contributions.standard_error(measure)[position].T
    if measure == "variance":
        scale = dict(colorscale=SEQUENTIAL, zmin=0.0, zmax=_largest(cells))
    else:
        bound = max(_largest(contributions.aps[position]), _largest(contributions.ans[position]))
        scale = dict(colorscale=DIVERGING, zmin=-bound, zmax=bound, zmid=0.0)
    figure = go.Figure(
        go.Heatmap(
            z=cells,
            x=list(contributions.senders),
            y=list(contributions.receivers),
            customdata=errors,
            xgap=1,
            ygap=1,
            hoverongaps=False,
            hovertemplate=(
                "%{x} → router of %{y}<br>%{z:.4g} ± %{customdata:.2g} " + UNITS[measure] + "<extra></extra>"
            ),
            colorbar=_colorbar(UNITS[measure]),
            **scale,
        )
    )
    title = f"{MEASURE_NAMES[measure]}, {POSITION_NAMES[position]}"
    _lay_out(figure, title, "sender", "receiving router", n_rows=len(contributions.receivers))
    figure.update_xaxes(type="category")
    # Routers from the first at the top, as the stream passes them.
    figure.update_yaxes(type="category", autorange="reversed")
    return figure


def load_heatmap(load: ExpertLoad) -> go.Figure:
    """A heatmap of each expert's share of tokens in %; white is the even share, k / N.

    The colours are centred on that share: red experts are chosen by more tokens, blue ones by fewer.
    """
    percent, even = 100 * load.shares, 100 * load.uniform
    reach = max(float(np.abs(percent - even).max()), 1e-9)
    low, high = float(percent.min()), float(percent.max())
    marks = {even: f"{even:.1f} even"}
    for value, word in ((low, "least"), (high, "most")):
        # Marks that would lie on top of each other are left out; the hover has every number.
        if abs(value - even) > 0.15 * reach:
            marks[value] = f"{value:.1f} {word}"
    colorbar = _colorbar("% of tokens") | dict(tickvals=list(marks), ticktext=list(marks.values()))
    figure = go.Figure(
        go.Heatmap(
            z=percent,
            x=[str(expert) for expert in range(percent.shape[1])],
            y=[f"M{layer}" for layer in load.layers],
            xgap=1,
            ygap=1,
            colorscale=DIVERGING,
            zmin=even - reach,
            zmax=even + reach,
            zmid=even,
            hovertemplate="%{y}, expert %{x}<br>%{z:.2f}% of tokens<extra></extra>",
            colorbar=colorbar,
        )
    )
    title = f"Share of tokens that choose each expert (even: k / N = {load.uniform:.1%})"
    _lay_out(figure, title, "expert", "MoE layer", n_rows=len(load.layers))
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", autorange="reversed")
    return figure


def _largest(cells: np.ndarray) -> float:
    """The largest size of a value; a scale needs some width even where all are zero (or there is none)."""
    sizes = np.abs(cells[~np.isnan(cells)])
    return max(float(sizes.max()), 1e-12) if sizes.size else 1.0


def _colorbar(title: str) -> dict:
    return dict(
        title=dict(text=title, side="top", font=dict(size=11, color=MUTED)),
        thickness=10,
        outlinewidth=0,
        tickfont=dict(size=11, color=MUTED),
        ticks="",
        len=1.0,
    )


def _lay_out(figure: go.Figure, title: str, x_title: str, y_title: str, n_rows: int) -> None:
    axis = dict(
        showgrid=False,
        zeroline=False,
        ticks="",
        tickfont=dict(size=11, color=MUTED),
        title=dict(font=dict(size=12, color=MUTED), standoff=8),
    )
    figure.update_layout(
        title=dict(text=title, font=dict(size=14, color=INK), x=0, xref="container", pad=dict(l=4), y=0.97),
        font=dict(family=FONT, color=INK),
        margin=dict(l=56, r=8, t=44, b=52),
        height=110 + max(150, min(26 * n_rows, 900)),
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor=BLANK,
        hoverlabel=dict(bgcolor="white", bordercolor=GRID, font=dict(family=FONT, size=12, color=INK)),
        xaxis=axis | dict(title_text=x_title),
        yaxis=axis | dict(title_text=y_title),
    )
