"""Name movers: what heads do to the answer, beside what they say to a router and what they attend to."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_lens.interventions.name_movers import KEYS, NameMovers
from moe_lens.plots.style import MUTED, colorbar, diverging, lay_out, layout_of, literal, sequential

_LEFTS = (0.0, 0.335, 0.56, 0.785)
_WIDTH = 0.2
_ROWS = ((0.57, 0.97), (0.0, 0.4))
"""Where the eight panels lie, as shares of the figure: the first column has a colour bar of its own."""


def name_mover_maps(movers: NameMovers) -> go.Figure:
    """Eight maps `[layer, head]`. On the left what path patching from each head does at END, to logit(IO) - logit(S)
    and to logit(IO) alone, in one scale. Beside it, for the keys S1, S2 and IO: above the variance of the scores that
    the head carries from there to the router at END, below how much END attends there; each row in one scale.

    Heads after the router are blank in the maps of variance and attention.

    Args:
        movers: from `name_movers`.

    Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), figure 17.
    """
    n_layers, n_heads = movers.effect.shape
    effects = [
        ("logit(IO) − logit(S)", movers.effect, movers.effect_standard_error),
        ("logit(IO)", movers.effect_on_IO, movers.effect_on_IO_standard_error),
    ]
    of_keys = [
        [
            (f"(END, {key}): {name}", getattr(movers.maps[key], quantity), _error_of(movers, key, quantity))
            for key in KEYS
        ]
        for quantity, name in (("variance", "variance of scores"), ("attention", "attention"))
    ]
    figure = make_subplots(rows=2, cols=4)
    effect_scale = diverging(*(cells for _, cells, _ in effects))
    for row in range(2):
        title, cells, errors = effects[row]
        unit = "logits"
        bar = colorbar("logits", x=_LEFTS[0] + _WIDTH + 0.008, xanchor="left")
        scale = effect_scale | dict(showscale=row == 0, colorbar=bar)
        _add(figure, row, 0, f"Patched: {title}", np.asarray(cells), np.asarray(errors), unit, scale)
        panels = [(title, cells.numpy(), errors.numpy()) for title, cells, errors in of_keys[row]]
        shared = sequential(np.stack([cells for _, cells, _ in panels]))
        unit = ("logits²", "")[row]
        low, high = _ROWS[row]
        bar = colorbar(unit or "weight", x=1.0, xanchor="left", y=(low + high) / 2, len=high - low)
        for column, (title, cells, errors) in enumerate(panels, start=1):
            scale = shared | dict(showscale=column == 3, colorbar=bar)
            _add(figure, row, column, title, cells, errors, unit, scale)
    heading = "What each head does at END of indirect-object prompts"
    subtitle = (
        f"means over {movers.n_prompts} prompts; left: change when the head's output is that of a corrupted prompt "
        f"(held: {_held(movers.freeze)}); right: scores at the router of {literal(movers.router)}"
    )
    lay_out(figure, heading, "", "", subtitle=subtitle)
    figure.update_layout(height=230 + 2 * max(110, min(24 * n_layers, 700)), margin_t=84, margin_r=56)
    _place_axes(figure, n_layers, n_heads)
    return figure


def _error_of(movers: NameMovers, key: str, quantity: str) -> Any:
    """The standard errors of a map."""
    return getattr(movers.maps[key], f"{quantity}_standard_error")


def _held(freeze: str) -> str:
    return {"attention": "attention", "routing": "attention, routing", "all": "attention and MLPs"}[freeze]


def _add(
    figure: go.Figure,
    row: int,
    column: int,
    title: str,
    cells: np.ndarray,
    errors: np.ndarray,
    unit: str,
    scale: dict[str, Any],
) -> None:
    n_layers, n_heads = cells.shape
    error = "" if np.isnan(errors).all() else " ± %{customdata:.2g}"
    figure.add_trace(
        go.Heatmap(
            name=title,
            z=cells,
            customdata=errors,
            x=[f"H{head}" for head in range(n_heads)],
            y=[f"A{layer}" for layer in range(n_layers)],
            xgap=1,
            ygap=1,
            hoverongaps=False,
            hovertemplate=f"{title}<br>%{{y}}%{{x}}: %{{z:.4g}}{error} {unit}".rstrip() + "<extra></extra>",
            **scale,
        ),
        row=row + 1,
        col=column + 1,
    )
    figure.add_annotation(
        text=title,
        x=_LEFTS[column],
        y=_ROWS[row][1] + 0.01,
        xref="paper",
        yref="paper",
        xanchor="left",
        yanchor="bottom",
        showarrow=False,
        font=dict(size=12, color=MUTED),
    )


def _place_axes(figure: go.Figure, n_layers: int, n_heads: int) -> None:
    figure.update_xaxes(type="category", nticks=0 if n_heads <= 8 else 8)
    figure.update_yaxes(type="category", autorange="reversed", nticks=0 if n_layers <= 24 else 16)
    layout = layout_of(figure)
    for panel in range(8):
        row, column = divmod(panel, 4)
        number = "" if panel == 0 else panel + 1
        layout[f"xaxis{number}"].update(domain=[_LEFTS[column], _LEFTS[column] + _WIDTH])
        layout[f"yaxis{number}"].update(domain=list(_ROWS[row]), showticklabels=column in (0, 1))
        if row == 1:
            layout[f"xaxis{number}"].update(title_text="head")
    for number in ("", 5):
        layout[f"yaxis{number}"].update(title_text="attention layer")
