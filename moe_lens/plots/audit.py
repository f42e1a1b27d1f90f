"""Figures of an audit: every cell's effect with its interval, the control over the depth, and the two scopes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moe_lens.audit.audit_result import Audit
from moe_lens.audit.protocol_presets import AUDIT_PRESETS
from moe_lens.plots.audit_cells import (
    D_TITLE,
    KEY,
    NEEDED,
    Cells,
    cells_of,
    chosen_rows,
    hover_of,
    metric_range,
    names_of,
    with_interval,
)
from moe_lens.plots.labelled import (
    arms,
    colour_and_symbol,
    counted,
    depth_axis,
    depths,
    labelled,
    legend_below_heading,
    paler,
    shown_label,
)
from moe_lens.plots.style import (
    CATEGORIES,
    GREY,
    MUTED,
    fit_axis,
    lay_out,
    lay_out_chart,
    literal,
)

_FAMILIES = {"metrics": "metric", "control": "control"}
_OF_FAMILIES = {"metrics": (MUTED, "circle"), "control": (CATEGORIES[1], "diamond")}
_CONTROL_NAMES = {"first_order": "first-order attribution", "direct": "direct effect on the logits"}
_ON_HUB = {key: preset.model for key, preset in AUDIT_PRESETS.items()}


def control_lines(
    cells: Cells, *, control: str = "routing_weight", published: pd.DataFrame | None = None
) -> go.Figure:
    """A control's effect against depth, a line for each model with its interval as a band; in grey behind them the
    range of d over all cells of the metrics, of all models.

    The x axis is the layer, or the layer by the last one of the same model where these differ.

    Args:
        cells: of one model or several.
        control: whose d is shown.
        published: another table of cells, as `moe_lens.audit.published.published_cells()`, whose values of the control
            are drawn as open marks without interval: in the colour of the model that it is of, if that is shown. A
            column `label` names that model as `cells` do; otherwise it is known by `model`.

    Raises:
        ValueError: another frame; no such control, here or in `published`; two rows of one control and layer.

    Source: "From Observation to Intervention: A Causal Audit of Expert Importance in Mixture-of-Experts Models"
    (arXiv:2606.10703), figure 1 and tables 4 to 6.
    """
    frame = cells_of(cells)
    rows = _of_control(frame, control, "the audit")
    others = None if published is None else _published(published, control, rows)
    together = rows if others is None else pd.concat([rows, others])
    x, relative = depths(together)
    of_rows, of_others = x[: len(rows)], x[len(rows) :]
    figure = go.Figure()
    for i, label in enumerate(rows["label"].unique()):
        of = (rows["label"] == label).to_numpy()
        part, places = rows.loc[of], of_rows[of]
        order = np.argsort(places)
        for trace in _control_line(part.iloc[order], places[order], str(label), i):
            figure.add_trace(trace)
    if others is not None:
        _add_published(figure, others, of_others, rows)
    n_missing = int(np.isnan(rows["d"].to_numpy(float)).sum())
    within, of_metrics = metric_range(frame), frame.loc[frame["family"] == "metrics"]
    subtitle = counted(len(rows), "cell")
    if within is not None:
        subtitle += f"; in grey the range of {counted(len(of_metrics), 'cell')} of metrics"
    if n_missing:
        subtitle += f"; {n_missing} without a test"
    lay_out(
        figure,
        f"Effect of the {_CONTROL_NAMES.get(control, literal(control).replace('_', ' '))} as a ranking, by depth",
        "",
        D_TITLE,
        subtitle=subtitle,
    )
    lay_out_chart(figure)
    depth_axis(figure, x, relative)
    reach = together[["d", "d_low", "d_high"]].to_numpy(float).ravel()
    fit_axis(figure.update_yaxes, np.concatenate([reach, within or ()]), "linear")
    if within is not None:
        figure.add_hrect(
            y0=within[0],
            y1=within[1],
            fillcolor=GREY,
            opacity=0.35,
            line_width=0,
            layer="below",
            showlegend=True,
            name=f"all metrics: {within[0]:+.3f} to {within[1]:+.3f}".replace("-", "−"),
        )
    legend_below_heading(figure)
    return figure


def scope_pairs(
    token: Audit | pd.DataFrame,
    sequence: Audit | pd.DataFrame,
    *,
    layers: Sequence[int] | int | None = None,
    metrics: Sequence[str] | str | None = None,
) -> go.Figure:
    """d with each expert ablated at one token against d with it ablated wherever the sequence activates it: a point for
    each cell, with both intervals, and the diagonal, on which the scope makes no difference.

    Args:
        token: an Audit, or its cells, of a census with scope `token`.
        sequence: of the same model, with scope `sequence`.
        layers: that are shown; None is all, which must then be those of both.
        metrics: metrics and controls that are shown; None likewise.

    Raises:
        ValueError: another frame; other scopes or other models; cells that only one of the two has.

    Source: what "From Observation to Intervention: A Causal Audit of Expert Importance in Mixture-of-Experts Models"
    (arXiv:2606.10703) says, an ablation at the token, and what its released code does
    (https://github.com/callmeloui/observational_metrics), one at every token of the text.
    """
    _require_same_weights(token, sequence)
    key = ["model", *KEY]
    both = []
    for given, scope in ((token, "token"), (sequence, "sequence")):
        frame = labelled(given, "cells", (*NEEDED, "model", "scope"), key, "an Audit or its cells")
        scopes = sorted(set(frame["scope"].astype(str)))
        if scopes != [scope]:
            raise ValueError(f"{scope}= needs cells of scope {scope!r}, not {', '.join(map(repr, scopes))}")
        if frame.duplicated(key).any():
            raise ValueError(
                f"{scope}= has more than one row of some model, metric and layer: give one run of each"
            )
        both.append(_chosen(frame, layers, metrics).assign(row=lambda rows: rows.index))
    _require_same_cells(both[0], both[1], key)
    pairs = both[0].merge(both[1], on=key, suffixes=("_token", "_sequence"))
    figure = go.Figure()
    columns = [f"{name}_{scope}" for scope in ("token", "sequence") for name in ("d", "d_low", "d_high")]
    values = pairs[columns].to_numpy(float)
    there = values[np.isfinite(values)]
    ends = [float(there.min()), float(there.max())] if there.size else [0.0, 1.0]
    pad = 0.05 * max(ends[1] - ends[0], 1e-12)
    reach = [ends[0] - pad, ends[1] + pad]
    figure.add_trace(
        go.Scatter(
            x=reach,
            y=reach,
            mode="lines",
            line=dict(width=1, color=MUTED, dash="dash"),
            hoverinfo="skip",
            name="no difference",
        )
    )
    for family, (colour, symbol) in _OF_FAMILIES.items():
        rows = pairs.loc[pairs["family"] == family]
        if len(rows):
            figure.add_trace(_pairs_of(rows, family, colour, symbol))
    n_missing = int(np.isnan(pairs[["d_token", "d_sequence"]].to_numpy(float)).any(axis=1).sum())
    lay_out(
        figure,
        "Effect of ablation at one token, and wherever active",
        "d, at one token",
        "d, wherever active",
        height=560,
        subtitle=counted(len(pairs), "cell") + (f"; {n_missing} without a test" if n_missing else ""),
    )
    lay_out_chart(figure)
    figure.update_xaxes(range=reach, constrain="domain")
    figure.update_yaxes(range=reach, constrain="domain", scaleanchor="x", scaleratio=1)
    legend_below_heading(figure, lines=1)
    return figure


# ---- the control ----


def _of_control(frame: pd.DataFrame, control: str, where: str) -> pd.DataFrame:
    controls = frame.loc[frame["family"] == "control"]
    rows = controls.loc[controls["metric"] == control]
    if len(rows) == 0:
        there = ", ".join(map(str, controls["metric"].unique())) or "none"
        raise ValueError(f"{where} has no control {control!r}; it has {there}")
    return rows


def _control_line(rows: pd.DataFrame, x: np.ndarray, label: str, number: int) -> list[go.Scatter]:
    colour, symbol = colour_and_symbol(number)
    d, low, high = (rows[name].to_numpy(float) for name in ("d", "d_low", "d_high"))
    band_x: list[float | None] = []
    band_y: list[float | None] = []
    # A shape for each run of layers that have an interval: a layer without leaves a gap.
    there = np.flatnonzero(np.isfinite(low) & np.isfinite(high))
    for run in np.split(there, np.flatnonzero(np.diff(there) > 1) + 1):
        band_x += [*x[run], *x[run][::-1], None]
        band_y += [*high[run], *low[run][::-1], None]
    band = go.Scatter(
        x=band_x,
        y=band_y,
        mode="lines",
        fill="toself",
        fillcolor=paler(colour, 0.16),
        line=dict(width=0),
        hoverinfo="skip",
        legendgroup=label,
        showlegend=False,
    )
    line = go.Scatter(
        x=x,
        y=d,
        mode="lines+markers",
        line=dict(width=2, color=colour),
        marker=dict(size=8, color=colour, symbol=symbol),
        # Of a single layer, the band has no width.
        error_y=dict(**arms(d, low, high), thickness=1, width=0, color=paler(colour, 0.6)),
        text=hover_of(rows),
        customdata=rows.index.to_numpy(),
        hovertemplate="%{text}<extra></extra>",
        legendgroup=label,
        name=shown_label(label),
    )
    return [band, line]


def _published(published: pd.DataFrame, control: str, rows: pd.DataFrame) -> pd.DataFrame:
    lacking = [name for name in ("model", *KEY, "n", "d") if name not in published]
    if lacking:
        raise ValueError(
            f"published= takes cells as published_cells() has them, and this has no {', '.join(lacking)}"
        )
    others = _of_control(published, control, "published").copy()
    if "label" not in others:
        labels = (
            {} if "model" not in rows else dict(zip(rows["model"].astype(str), rows["label"], strict=True))
        )
        # A key of the presets, or the name on the hub.
        others["label"] = [
            labels.get(name, labels.get(_ON_HUB.get(name, name), name)) for name in others["model"]
        ]
    return others


def _add_published(figure: go.Figure, others: pd.DataFrame, x: np.ndarray, rows: pd.DataFrame) -> None:
    shown = [str(label) for label in rows["label"].unique()]
    counts = sorted({int(n) for n in others["n"]})
    n = f"n = {counts[0]:,}" if len(counts) == 1 else f"n = {counts[0]:,} to {counts[-1]:,}"
    for label in others["label"].unique():
        of = (others["label"] == label).to_numpy()
        part, places = others.loc[of], x[of]
        colour, symbol = colour_and_symbol(shown.index(label)) if label in shown else (MUTED, "circle")
        figure.add_trace(
            go.Scatter(
                x=places,
                y=part["d"].to_numpy(float),
                mode="markers",
                marker=dict(size=11, symbol=f"{symbol}-open", color=colour, line=dict(width=1.8)),
                text=[
                    f"published, {shown_label(label)}, M{layer}<br>d = {d:+.3f}, n = {count:,}".replace(
                        "-", "−"
                    )
                    for layer, d, count in zip(part["layer"], part["d"], part["n"], strict=True)
                ],
                customdata=part.index.to_numpy(),
                hovertemplate="%{text}<extra></extra>",
                name=f"published {shown_label(label)}",
                legendgroup="published",
                showlegend=False,
            )
        )
    # One entry for all of them, of no model's colour.
    figure.add_trace(
        go.Scatter(
            x=[None],
            y=[None],
            mode="markers",
            marker=dict(size=11, symbol="circle-open", color=MUTED, line=dict(width=1.8)),
            name=f"published, {n}",
            legendgroup="published",
        )
    )


# ---- the two scopes ----


def _require_same_weights(token: object, sequence: object) -> None:
    if not (isinstance(token, Audit) and isinstance(sequence, Audit)):
        return
    ours, theirs = token.provenance.get("weights"), sequence.provenance.get("weights")
    if ours != theirs:
        raise ValueError(
            f"both must be of the same weights, not {str(ours)[:12]} (token) and {str(theirs)[:12]} (sequence)"
        )


def _chosen(
    frame: pd.DataFrame, layers: Sequence[int] | int | None, metrics: Sequence[str] | str | None
) -> pd.DataFrame:
    if layers is not None:
        wanted = [layers] if isinstance(layers, (int, np.integer)) else list(layers)
        frame = frame.loc[chosen_rows(frame, "layer", wanted)]
    return frame if metrics is None else frame.loc[chosen_rows(frame, "metric", names_of(metrics))]


def _require_same_cells(token: pd.DataFrame, sequence: pd.DataFrame, key: Sequence[str]) -> None:
    cells = [dict.fromkeys(rows[list(key)].itertuples(index=False, name=None)) for rows in (token, sequence)]
    if not cells[0].keys() & cells[1].keys():
        models = [", ".join(map(str, rows["model"].unique())) for rows in (token, sequence)]
        raise ValueError(f"the two have no cell in common: token is of {models[0]}, sequence of {models[1]}")
    for here, there, name in ((cells[0], cells[1], "token"), (cells[1], cells[0], "sequence")):
        alone = [cell for cell in here if cell not in there]
        if alone:
            model, _, metric, layer = alone[0]
            more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
            raise ValueError(
                f"only {name} has {metric} at layer {layer} of {model}{more}; layers= and metrics= choose common ones"
            )


def _pairs_of(rows: pd.DataFrame, family: str, colour: str, symbol: str) -> go.Scatter:
    d = {scope: rows[f"d_{scope}"].to_numpy(float) for scope in ("token", "sequence")}
    bars = {
        scope: dict(
            **arms(d[scope], rows[f"d_low_{scope}"].to_numpy(float), rows[f"d_high_{scope}"].to_numpy(float)),
            thickness=0.7,
            width=0,
            color=paler(colour, 0.3),
        )
        for scope in d
    }
    texts = []
    for row in rows.to_dict("records"):
        lines = [f"{literal(row['metric'])}, M{row['layer']}, {literal(row['model'])}"]
        for scope, said in (("token", "at one token"), ("sequence", "wherever active")):
            interval = with_interval(*(row[f"{name}_{scope}"] for name in ("d", "d_low", "d_high")))
            verdict = literal(row[f"verdict_{scope}"])
            lines.append(f"{said}: d = {interval}, {verdict}, row {literal(row[f'row_{scope}'])}")
        texts.append("<br>".join(lines))
    return go.Scatter(
        x=d["token"],
        y=d["sequence"],
        mode="markers",
        marker=dict(size=7, color=colour, symbol=symbol, line=dict(width=0.5, color="white")),
        error_x=bars["token"],
        error_y=bars["sequence"],
        text=texts,
        customdata=rows[["row_token", "row_sequence"]].to_numpy(),
        hovertemplate="%{text}<extra></extra>",
        name=f"{_FAMILIES[family]}s" if len(rows) != 1 else _FAMILIES[family],
    )


__all__ = ["control_lines", "scope_pairs"]
