"""The load of experts: each one's share of tokens, about the even share."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from moe_lens.plots.style import DIVERGING, colorbar, lay_out
from moe_lens.routing.load import ExpertLoad


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
            colorbar=colorbar("% of tokens", tickvals=list(marks), ticktext=list(marks.values())),
        )
    )
    title = f"Share of tokens that choose each expert (even: k / N = {load.uniform:.1%})"
    lay_out(figure, title, "expert", "MoE layer", n_rows=len(load.layers))
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", autorange="reversed")
    return figure
