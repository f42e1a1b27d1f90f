"""Does the router's weight say how large an expert's part is, and how much of it does the rest of the layer write?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_lens.audit.redistribution import Redistribution
from moe_lens.plots.labelled import (
    arms,
    colour_and_symbol,
    counted,
    depth_axis,
    depths,
    labelled,
    legend_below_heading,
    name_panel,
    paler,
    shown_label,
)
from moe_lens.plots.style import fit_axis, lay_out, lay_out_chart, literal

_CHAINS = (
    ("routing_weight", "gap_norm", "routing weight and gap norm"),
    ("gap_norm", "relative_compensation", "gap norm and relative compensation"),
)
_NEEDED = ("layer", "x", "y", "given", "rho", "p", "n_experts", "low", "high")
_STARS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))


def redistribution_chains(
    redistribution: Redistribution | pd.DataFrame | Sequence[Redistribution],
) -> go.Figure:
    """Spearman's rho over the experts of a layer, against depth, a line for each model. On the left of routing weight
    and gap norm: does the router follow how large an expert's part is? On the right of gap norm and relative
    compensation: how much of that part does the rest of the layer write too? The source reads it as whether the part
    reaches the logits, which nothing here measures. Bars are intervals over resampled documents; stars say p < 0.05
    (*), 0.01 (**) and 0.001 (***), where p takes experts for independent and is not corrected for many tests.

    Args:
        redistribution: a `Redistribution`, its `correlations` (with a column `label` for several models), or several.
            Correlations with something held fixed (`given`) are not shown.

    Raises:
        ValueError: another frame; no rows, or none of either chain; two rows of one chain and layer.

    Source: "From Observation to Intervention: A Causal Audit of Expert Importance in Mixture-of-Experts Models"
    (arXiv:2606.10703), figure 2 and table 7.
    """
    expected = "a Redistribution, its correlations or a sequence of Redistributions"
    frame = labelled(redistribution, "correlations", _NEEDED, ("x", "y", "given", "layer"), expected)
    plain = frame.loc[frame["given"] == ""]
    of_chains = [plain.loc[(plain["x"] == x) & (plain["y"] == y)] for x, y, _ in _CHAINS]
    for rows, (x_name, y_name, _) in zip(of_chains, _CHAINS, strict=True):
        if len(rows) == 0:
            raise ValueError(f"there are no rows of {x_name} and {y_name} with nothing given")
    shown = pd.concat(of_chains)
    places, relative = depths(shown)
    labels = [*shown["label"].unique()]
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.06)
    start = 0
    for panel, rows in enumerate(of_chains):
        x = places[start : start + len(rows)]
        start += len(rows)
        for i, label in enumerate(labels):
            of = (rows["label"] == label).to_numpy()
            order = np.argsort(x[of])
            for trace in _line(rows.loc[of].iloc[order], x[of][order], str(label), i, panel):
                figure.add_trace(trace, row=1, col=panel + 1)
    n_missing = int(np.isnan(shown["rho"].to_numpy(float)).sum())
    lay_out(
        figure,
        "From routing weight to gap norm to relative compensation",
        "",
        "Spearman's rho, over experts",
        subtitle=counted(len(shown), "correlation")
        + (f"; {n_missing} without a value" if n_missing else "")
        + f"; bars: {_confidence(redistribution)}over documents drawn anew"
        + "<br>stars: p over experts, uncorrected: * p < 0.05, ** 0.01, *** 0.001",
    )
    lay_out_chart(figure)
    depth_axis(figure, places, relative)
    fit_axis(figure.update_yaxes, shown[["rho", "low", "high"]].to_numpy(float).ravel(), "linear")
    figure.update_yaxes(title_text="", col=2)
    legend_below_heading(figure, lines=2 if len(labels) > 1 else 0, panel_names=2, subtitle_lines=2)
    for panel, (_, _, said) in enumerate(_CHAINS):
        # Two lines, so that a narrow figure has room for both.
        name_panel(figure, panel, said.replace(" and ", "<br>and "))
    figure.update_layout(showlegend=len(labels) > 1)
    return figure


def _confidence(given: Redistribution | pd.DataFrame | Sequence[Redistribution]) -> str:
    """Of the bars, where what is given says so: a frame does not."""
    if isinstance(given, pd.DataFrame):
        return ""
    found = [given] if isinstance(given, Redistribution) else given
    levels = {one.provenance.get("confidence") for one in found}
    level = levels.pop() if len(levels) == 1 else None
    return "" if level is None else f"{100 * level:g}% "


def stars(p: float) -> str:
    """As the source marks them; none for a p that is missing."""
    return next((marks for below, marks in _STARS if p < below), "")


def _line(rows: pd.DataFrame, x: np.ndarray, label: str, number: int, panel: int) -> list[go.Scatter]:
    colour, symbol = colour_and_symbol(number)
    rho, low, high = (rows[name].to_numpy(float) for name in ("rho", "low", "high"))
    texts = []
    for index, row in zip(rows.index, rows.to_dict("records"), strict=True):
        interval = f"{row['rho']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})".replace("-", "−")
        texts.append(
            f"M{row['layer']}" + (f", {literal(label)}" if label else "") + f"<br>rho = {interval}"
            f"<br>p = {row['p']:.2g}; {counted(int(row['n_experts']), 'expert')}<br>row {literal(index)}"
        )
    line = go.Scatter(
        x=x,
        y=rho,
        mode="lines+markers",
        line=dict(width=2, color=colour),
        marker=dict(size=8, color=colour, symbol=symbol),
        error_y=dict(**arms(rho, low, high), thickness=1.2, width=3, color=paler(colour, 0.7)),
        text=texts,
        customdata=rows.index.to_numpy(),
        hovertemplate="%{text}<extra></extra>",
        name=shown_label(label),
        legendgroup=label,
        showlegend=panel == 0,
    )
    # Of every second model below, as models meet at the first and last layer.
    above = number % 2 == 0
    marks = go.Scatter(
        x=x,
        y=np.where(np.isnan(high), rho, high) if above else np.where(np.isnan(low), rho, low),
        mode="text",
        text=[stars(float(p)) for p in rows["p"]],
        textposition="top center" if above else "bottom center",
        textfont=dict(size=12, color=colour),
        cliponaxis=False,
        hoverinfo="skip",
        legendgroup=label,
        showlegend=False,
        name="stars",
    )
    return [line, marks]


__all__ = ["redistribution_chains"]
