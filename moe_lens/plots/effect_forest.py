"""Every cell of an audit: what a metric's choice of an expert does to the loss, with its interval, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_lens.audit.audit_result import Audit
from moe_lens.audit.paired_tests import SMALLEST_EFFECT
from moe_lens.plots.audit_cells import D_TITLE, Cells, cells_of, chosen_rows, hover_of, metric_range, names_of
from moe_lens.plots.labelled import arms, counted, legend_below_heading, name_panel, shown_label
from moe_lens.plots.style import CATEGORIES, GREY, GRID, INK, MUTED, fit_axis, lay_out, lay_out_chart, literal
from moe_lens.routing.arguments import layers_said

Row = tuple[str, str]
"""A family and a metric."""

# Colour, mark, and how much larger than an unremarkable one it is drawn.
_VERDICTS: dict[str, tuple[str, str, float]] = {
    "equivalent": (MUTED, "circle", 0.0),
    "inconclusive": (CATEGORIES[5], "circle-open", 0.5),
    "valid": (CATEGORIES[0], "triangle-right", 3.0),
    "inverted": (CATEGORIES[1], "triangle-left", 3.0),
    "disagreement": (CATEGORIES[6], "x", 1.5),
}
_BETWEEN_ROWS, _BETWEEN_FAMILIES = 1.6, 2.0
"""In layers."""
_HEIGHT, _THINNEST, _THICKEST = 1000, 4.0, 12.0
"""Pixels: of all rows together if they can, and of one layer in a row."""
_LOWEST_ROW = 20


def effect_forest(
    cells: Cells,
    *,
    metrics: Sequence[str] | str | None = None,
    family: Literal["metrics", "control"] | None = None,
    smallest_effect: float | None = None,
) -> go.Figure:
    """Cohen's d of every cell with its interval: a row for each metric, in it a line for each layer, the first on top;
    a panel for each model. Controls stand above the metrics, apart. Colour and mark say the verdict. In grey behind
    them: the range of d over all cells of metrics, of all models, whether shown or not. The legend counts cells of
    metrics, and controls apart.

    The bars are 95% intervals (at the audit's alpha of 0.05). `equivalent` is of two one-sided tests at that level,
    which go by a 90% interval, so that its bar may cross a dashed line. The mark of a metric that claims most for its
    lowest values, as the column `higher_is_more_important` says, is "(low)" behind its name.

    Args:
        cells: of one model or several.
        metrics: of the column `metric`, metrics or controls, that are shown, in the table's order; None is all.
        family: that is shown alone: `metrics` or `control`.
        smallest_effect: where dashed lines stand on both sides of zero; None is that of the Audits' verdicts, for a
            frame that of the protocol (0.1). 0 draws none.

    Raises:
        ValueError: another frame; no rows; no such family or metric; verdicts that are none; two rows of one metric and
            layer; Audits whose smallest effects differ, where none is given.

    Source: "From Observation to Intervention: A Causal Audit of Expert Importance in Mixture-of-Experts Models"
    (arXiv:2606.10703), tables 1 to 6, as a figure.
    """
    frame = cells_of(cells)
    effect = _smallest_effect(cells, smallest_effect)
    within, shown = metric_range(frame), frame
    if family is not None:
        if family not in ("metrics", "control"):
            raise ValueError(f"family must be metrics or control, not {family!r}")
        shown = shown.loc[shown["family"] == family]
        if len(shown) == 0:
            raise ValueError(f"there are no cells of family {family!r}")
    if metrics is not None:
        shown = shown.loc[chosen_rows(shown, "metric", names_of(metrics))]
    unknown = [str(name) for name in shown["verdict"].unique() if name not in _VERDICTS]
    if unknown:
        raise ValueError(f"a verdict is one of {', '.join(_VERDICTS)}, not {unknown[0]!r}")
    labels = [*shown["label"].unique()]
    layers = {label: sorted(shown.loc[shown["label"] == label, "layer"].unique()) for label in labels}
    tops, ends, most = _rows_of(shown, layers)
    pixels = max(min(max(_HEIGHT / ends, _THINNEST), _THICKEST), _LOWEST_ROW / (most + _BETWEEN_ROWS))
    figure = make_subplots(rows=1, cols=len(labels), shared_yaxes=True, horizontal_spacing=0.1 / len(labels))
    if effect:
        for panel in range(len(labels)):
            figure.add_trace(_effect_lines(effect, ends, panel == 0), row=1, col=panel + 1)
    found = set(shown["verdict"])
    verdicts = [name for name in _VERDICTS if name in found]
    both = len(shown["family"].unique()) > 1
    for verdict in verdicts:
        of_verdict = shown.loc[shown["verdict"] == verdict]
        name = f"{verdict} ({_count(of_verdict, both)})"
        for panel, label in enumerate(labels):
            rows = of_verdict.loc[of_verdict["label"] == label]
            if len(rows):
                first = label == of_verdict["label"].unique()[0]
                y = _places(rows, tops, layers[label], most)
                trace = _marks(rows, y, verdict, name, min(max(pixels, 5.0), 7.0), first)
                figure.add_trace(trace, row=1, col=panel + 1)
    lay_out(figure, "Effect of each metric's choice, by layer", "", "", subtitle=_subtitle(shown))
    lay_out_chart(figure)
    figure.update_layout(height=round(pixels * ends) + 70 + 52, margin_l=8)
    # Where it is narrow, the legend has one entry a line.
    entries = len(verdicts) + bool(effect) + (within is not None)
    legend_below_heading(figure, lines=entries, panel_names=2, subtitle_lines=2)
    _axes(figure, shown, tops, most, ends, len(labels), [-effect, effect, *(within or ())])
    _name_panels(figure, labels, layers)
    _behind(figure, within, tops, len(labels))
    return figure


def _smallest_effect(cells: Cells, given: float | None) -> float:
    if given is not None:
        if not 0 <= given < np.inf:
            raise ValueError(f"smallest_effect={given} must be a Cohen's d from 0 on")
        return float(given)
    audits = () if isinstance(cells, pd.DataFrame) else (cells,) if isinstance(cells, Audit) else cells
    effects = {float(audit.provenance["settings"]["smallest_effect"]) for audit in audits}
    if len(effects) > 1:
        raise ValueError(
            f"the audits' smallest effects are {', '.join(f'{e:g}' for e in sorted(effects))}: give smallest_effect="
        )
    return effects.pop() if effects else SMALLEST_EFFECT


# ---- rows and places ----


def _rows_of(shown: pd.DataFrame, layers: Mapping[Any, Sequence[int]]) -> tuple[dict[Row, float], float, int]:
    """Where each row begins, in layers from the top; where the last one ends; and the most layers of a model."""
    most = max(map(len, layers.values()))
    tops: dict[Row, float] = {}
    y = _BETWEEN_ROWS / 2
    for family in ("control", "metrics"):
        of = shown.loc[shown["family"] == family, "metric"].unique()
        if tops and len(of):
            y += _BETWEEN_FAMILIES
        for metric in of:
            tops[family, str(metric)] = y
            y += most + _BETWEEN_ROWS
    return tops, y - _BETWEEN_ROWS / 2, most


def _places(rows: pd.DataFrame, tops: Mapping[Row, float], layers: Sequence[int], most: int) -> np.ndarray:
    """A model with fewer layers than another has them in the middle of its rows."""
    start = (most - len(layers)) / 2 + 0.5
    row_tops = np.array([tops[row] for row in zip(rows["family"], rows["metric"], strict=True)])
    return row_tops + start + np.searchsorted(layers, rows["layer"].to_numpy())


def _marks(
    rows: pd.DataFrame, y: np.ndarray, verdict: str, name: str, size: float, in_legend: bool
) -> go.Scatter:
    colour, symbol, more = _VERDICTS[verdict]
    d, low, high = (rows[column].to_numpy(float) for column in ("d", "d_low", "d_high"))
    return go.Scatter(
        x=d,
        y=y,
        mode="markers",
        marker=dict(size=size + more, color=colour, symbol=symbol),
        error_x=dict(**arms(d, low, high), thickness=1.1, width=0, color=colour),
        text=hover_of(rows),
        customdata=rows.index.to_numpy(),
        hovertemplate="%{text}<extra></extra>",
        name=name,
        legendgroup=verdict,
        showlegend=in_legend,
    )


# ---- around them ----


def _subtitle(shown: pd.DataFrame) -> str:
    """Two short lines: they do not wrap."""
    kinds = []
    for family, what in (("metrics", "metric"), ("control", "control")):
        names = set(shown.loc[shown["family"] == family, "metric"])
        if names:
            kinds.append(counted(len(names), what))
    n_missing = int(np.isnan(shown["d"].to_numpy(float)).sum())
    missing = f"; {n_missing} without a test" if n_missing else ""
    first = f"{counted(len(shown), 'cell')}: {', '.join(kinds)}; layers from the top down{missing}"
    return f"{first}<br>bars: 95%; “equivalent” goes by 90%, so its bar may cross a dashed line"


def _count(of_verdict: pd.DataFrame, both: bool) -> str:
    """Of metrics; where controls are shown too, of these apart."""
    controls = len(of_verdict.loc[of_verdict["family"] == "control"])
    if not both:
        return f"{len(of_verdict):,}"
    return f"{len(of_verdict) - controls:,}" + (f"; controls: {controls:,}" if controls else "")


def _row_name(shown: pd.DataFrame, row: Row) -> str:
    """With a mark where the lowest values are those that the metric claims most for."""
    family, metric = row
    name = literal(metric)
    if "higher_is_more_important" not in shown:
        return name
    of = shown.loc[(shown["family"] == family) & (shown["metric"] == metric)]
    return name if of["higher_is_more_important"].to_numpy(bool).all() else f"{name} (low)"


def _axes(
    figure: go.Figure,
    shown: pd.DataFrame,
    tops: Mapping[Row, float],
    most: int,
    ends: float,
    panels: int,
    beside: Sequence[float],
) -> None:
    figure.update_yaxes(
        range=[ends, 0],
        tickvals=[top + most / 2 for top in tops.values()],
        ticktext=[_row_name(shown, row) for row in tops],
        tickfont=dict(size=11, color=INK),
        showgrid=False,
        automargin=True,
    )
    reach = shown[["d", "d_low", "d_high"]].to_numpy(float).ravel()
    fit_axis(figure.update_xaxes, np.concatenate([reach, beside]), "linear")
    figure.update_xaxes(nticks=max(8 // panels, 5), tickangle=0)
    figure.add_annotation(
        text=D_TITLE,
        x=0.5,
        y=0,
        xref="paper",
        yref="paper",
        yshift=-26,
        yanchor="top",
        showarrow=False,
        font=dict(size=12, color=MUTED),
    )


def _name_panels(figure: go.Figure, labels: Sequence[object], layers: Mapping[Any, Sequence[int]]) -> None:
    for panel, label in enumerate(labels):
        text = f"{shown_label(label)}<br>{layers_said([int(i) for i in layers[label]])}"
        name_panel(figure, panel, text, size=11)


def _effect_lines(effect: float, ends: float, in_legend: bool) -> go.Scatter:
    """Not a shape: it would be under the grid, which may have a line at the same place."""
    return go.Scatter(
        x=[-effect, -effect, None, effect, effect],
        y=[0, ends, None, 0, ends],
        mode="lines",
        line=dict(width=1, color=INK, dash="dash"),
        hoverinfo="skip",
        name=f"smallest effect: ±{effect:g}",
        legendgroup="smallest effect",
        legendrank=1001,
        showlegend=in_legend,
    )


def _behind(
    figure: go.Figure,
    within: tuple[float, float] | None,
    tops: Mapping[Row, float],
    panels: int,
) -> None:
    """The range of metrics, and lines between rows."""
    kinds = [family for family, _ in tops]
    for panel in range(panels):
        number = "" if panel == 0 else panel + 1
        if within is not None:
            figure.add_shape(
                type="rect",
                xref=f"x{number}",
                yref="paper",
                x0=within[0],
                x1=within[1],
                y0=0,
                y1=1,
                layer="below",
                fillcolor=GREY,
                opacity=0.35,
                line_width=0,
                name=f"all metrics: {within[0]:+.3f} to {within[1]:+.3f}".replace("-", "−"),
                showlegend=panel == 0,
            )
        for i, top in enumerate([*tops.values()][1:], start=1):
            apart = kinds[i] != kinds[i - 1]
            y = top - (_BETWEEN_ROWS + _BETWEEN_FAMILIES * apart) / 2
            figure.add_shape(
                type="line",
                xref=f"x{number} domain",
                yref="y",
                x0=0,
                x1=1,
                y0=y,
                y1=y,
                layer="below",
                line=dict(width=1.5 if apart else 1, color=GREY if apart else GRID),
            )


__all__ = ["effect_forest"]
