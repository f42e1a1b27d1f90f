"""Progressive ablation: what becomes of the loss as the k heaviest active experts are taken away."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from moe_lens.audit.progressive import Progressive
from moe_lens.interventions.arguments import Layers, layer_numbers
from moe_lens.plots.style import (
    MUTED,
    SEQUENTIAL,
    fit_axis,
    lay_out,
    lay_out_chart,
    layout_of,
    literal,
    plus_minus,
)

_PANELS = (("mean", "delta_loss"), ("median", "delta_loss_median"), ("95th percentile", "delta_loss_p95"))
_DOMAINS = ((0.0, 0.27), (0.365, 0.635), (0.73, 1.0))
_MOST_NAMED = 24
_NEEDED = (
    "layer",
    "removed",
    "n_rows",
    "n_documents",
    "delta_loss",
    "delta_loss_standard_error",
    "delta_loss_median",
    "delta_loss_p95",
)


def progressive_lines(progressive: Progressive | pd.DataFrame, *, layers: Layers = None) -> go.Figure:
    """The change of the loss against k, how many of the heaviest experts are gone: a line for each layer, later ones
    darker. On the left the mean over tokens, with standard errors clustered by document; then the median and the 95th
    percentile, which say whether a mean is that of a minority of tokens.

    Args:
        progressive: or its `to_frame()`.
        layers: those that are shown; None is all.

    Raises:
        ValueError: another frame; no such layer; no rows.

    Source: "From Observation to Intervention: A Causal Audit of Expert Importance in Mixture-of-Experts Models"
    (arXiv:2606.10703), appendix C, tables 8 and 9.
    """
    frame = progressive.to_frame() if isinstance(progressive, Progressive) else progressive
    lacking = [name for name in _NEEDED if name not in frame]
    if lacking:
        raise ValueError(f"a Progressive or its to_frame() is needed, and this has no {', '.join(lacking)}")
    there = np.unique(frame["layer"].to_numpy()).tolist()
    if not there:
        raise ValueError("there are no rows to show")
    wanted = there if layers is None else list(layer_numbers(layers))
    for layer in wanted:
        if layer not in there:
            raise ValueError(f"there is no layer {layer!r}; there are {', '.join(map(str, there))}")
    figure = make_subplots(rows=1, cols=len(_PANELS))
    places = np.linspace(0.35, 1.0, max(len(wanted), 2))[-len(wanted) :]
    colours = sample_colorscale(SEQUENTIAL, places.tolist())
    for layer, colour in zip(sorted(wanted), colours, strict=True):
        rows = frame.loc[frame["layer"] == layer]
        for panel, (statistic, column) in enumerate(_PANELS):
            figure.add_trace(_line(rows, layer, str(colour), statistic, column), row=1, col=panel + 1)
    shown = frame.loc[frame["layer"].isin(wanted)]
    lay_out(
        figure,
        "Change of the loss without the k heaviest experts of one layer",
        "experts removed, the heaviest first (k)",
        "change of the loss (nats)",
        subtitle=_subtitle(progressive, shown),
    )
    lay_out_chart(figure)
    names = len(wanted) <= _MOST_NAMED
    figure.update_layout(showlegend=len(wanted) > 1 and names, legend=dict(font=dict(size=11)))
    _place(figure, shown)
    return figure


def _line(rows: pd.DataFrame, layer: int, colour: str, statistic: str, column: str) -> go.Scatter:
    is_mean = statistic == "mean"
    values = rows[column].to_numpy(float)
    nothing = np.full(len(rows), np.nan)
    errors = rows["delta_loss_standard_error"].to_numpy(float) if is_mean else nothing
    shown = plus_minus(values, errors, "nats")
    return go.Scatter(
        x=rows["removed"].to_numpy(),
        y=values,
        mode="lines+markers",
        line=dict(width=2, color=colour),
        marker=dict(size=5, color=colour),
        error_y=dict(array=np.nan_to_num(errors), thickness=1.2, width=3, color=colour) if is_mean else None,
        text=[
            f"M{layer} without its {k} heaviest<br>{statistic}: {value}<br>{n:,} tokens"
            for k, value, n in zip(rows["removed"], shown, rows["n_rows"], strict=True)
        ],
        hovertemplate="%{text}<extra></extra>",
        name=f"M{layer}",
        legendgroup=f"M{layer}",
        showlegend=is_mean,
    )


def _subtitle(progressive: Progressive | pd.DataFrame, shown: pd.DataFrame) -> str:
    n_tokens, n_documents = (int(shown[name].to_numpy().max()) for name in ("n_rows", "n_documents"))
    of = f"{n_tokens:,} tokens in {n_documents:,} document{'s' if n_documents != 1 else ''}"
    errors = ", with standard errors" if n_documents > 1 else ""
    how = (
        f"{literal(progressive.provenance['how'])} at one token; "
        if isinstance(progressive, Progressive)
        else ""
    )
    return f"{how}{of}{errors}"


def _place(figure: go.Figure, shown: pd.DataFrame) -> None:
    """Panels, each with an axis of its own: the percentile is far larger than the mean, and the median far smaller."""
    layout = layout_of(figure)
    errors = np.nan_to_num(shown["delta_loss_standard_error"].to_numpy(float))
    mean = shown["delta_loss"].to_numpy(float)
    reach = {column: shown[column].to_numpy(float) for _, column in _PANELS}
    reach["delta_loss"] = np.concatenate([mean - errors, mean + errors])
    removed = np.unique(shown["removed"].to_numpy())
    step = -(-len(removed) // 8)
    for panel, ((statistic, column), domain) in enumerate(zip(_PANELS, _DOMAINS, strict=True)):
        number = "" if panel == 0 else panel + 1
        layout[f"xaxis{number}"].update(
            domain=list(domain),
            tickvals=removed[::step].tolist(),
            range=[removed[0] - 0.3, removed[-1] + 0.3],
        )
        fit_axis(layout[f"yaxis{number}"].update, reach[column], "linear")
        layout[f"yaxis{number}"].update(nticks=7)
        if panel != 0:
            layout[f"yaxis{number}"].update(title_text="")
        if panel != 1:
            layout[f"xaxis{number}"].update(title_text="")
        figure.add_annotation(
            text=statistic,
            x=domain[0],
            y=1.01,
            xref="paper",
            yref="paper",
            xanchor="left",
            yanchor="bottom",
            showarrow=False,
            font=dict(size=12, color=MUTED),
        )
    figure.update_layout(margin_t=92)
