"""Lines over receivers: how far an expert's, or the embedding's, influence reaches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from scipy.stats import spearmanr

from moe_lens.plots.labels import label_points
from moe_lens.plots.style import (
    CATEGORIES,
    GREY,
    Scale,
    at_receivers,
    lay_out,
    lay_out_chart,
    log_ticks,
    plus_minus,
)
from moe_lens.plots.values import (
    MEASURE_NAMES,
    check_by,
    check_log,
    influence,
    of_tokens,
    table,
    unit,
    with_unit,
)
from moe_lens.routing.result import RoutingContributions

_DECADES = 6
"""A log axis shows no more than these; smaller values lie below it."""


def expert_lines(
    contributions: RoutingContributions,
    *,
    measure: str = "variance",
    position: str = "rest",
    when_active: bool = False,
    label: int = 8,
    scale: Scale = "linear",
) -> go.Figure:
    """A line for each expert, routed or shared, over the routers that it reaches: the most influential in colour,
    named at their peaks, and all others in grey.

    Args:
        contributions: by expert.
        measure, position, when_active: as for `stripes`.
        label: how many to name, by their largest size at any router (for the overlap, by their smallest).
        scale: `log` for measures that are never negative.

    Raises:
        ValueError: the result is not by expert; no such measure or position; a log scale of a signed measure.

    Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), figures 5
    and 19.
    """
    check_by(contributions, "expert", "expert_lines")
    values, errors = table(contributions, measure, position, when_active)
    check_log(measure, scale)
    if label < 0:
        raise ValueError(f"label={label} must not be negative")
    groups = [group.component for group in contributions.senders.groups if group.kind == "experts"]
    slices = [contributions.senders.slice_of(component) for component in groups]
    experts = np.array([i for s in slices for i in range(s.start, s.stop)], dtype=int)
    sizes = influence(measure, values[experts])
    peaks = np.where(np.isnan(sizes), -np.inf, sizes).max(axis=1, initial=-np.inf)
    reached = np.isfinite(peaks)
    experts, sizes, peaks = experts[reached], sizes[reached], peaks[reached]
    named = np.argsort(-peaks, kind="stable")[:label]
    others = np.setdiff1d(np.arange(len(experts)), named)

    figure = go.Figure(_grey_mass(values[experts[others]]))
    points = []
    for rank, i in enumerate(named):
        expert, colour = int(experts[i]), CATEGORIES[rank % len(CATEGORIES)]
        figure.add_trace(_line(contributions, values, errors, expert, measure, colour))
        at = int(np.nanargmax(sizes[i]))
        points.append((at, float(values[expert, at]), contributions.senders[expert], colour))
    title = f"{MEASURE_NAMES[measure]}: each expert at later routers"
    subtitle = f"{of_tokens(position, when_active)}; {len(experts):,} experts"
    if 0 < len(named) < len(experts):
        subtitle += f", the {len(named)} most influential named at their peaks"
    _lay_out(figure, contributions, title, subtitle, measure, scale, values[experts])
    label_points(figure, points, below=measure in ("ans", "overlap"))
    return figure


def embedding_line(
    contributions: RoutingContributions,
    *,
    measure: str = "variance",
    position: str = "rest",
    senders: str | Sequence[str] = "embed",
    scale: Scale = "linear",
) -> go.Figure:
    """How the embedding's influence (or that of a few named senders) fades over the routers, with standard errors.

    Args:
        contributions: of any granularity.
        measure, position: as for `stripes`.
        senders: names; each a line of its own.
        scale: `log` for measures that are never negative.

    Raises:
        ValueError: no such sender, measure or position; a log scale of a signed measure.

    Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), figures 2c
    and 14.
    """
    values, errors = table(contributions, measure, position)
    check_log(measure, scale)
    names = list(dict.fromkeys([senders] if isinstance(senders, str) else senders))
    if not names:
        raise ValueError("senders must name at least one")
    places = [contributions.senders.index(name) for name in names]
    figure = go.Figure()
    for rank, place in enumerate(places):
        colour = CATEGORIES[rank % len(CATEGORIES)]
        figure.add_trace(_line(contributions, values, errors, place, measure, colour, bars=True))
    whose = (
        "the embedding"
        if names == ["embed"]
        else ", ".join(names[:6]) + (" and others" if len(names) > 6 else "")
    )
    title = f"{MEASURE_NAMES[measure]}: {whose} at each router"
    subtitle = f"{of_tokens(position)}; bars: standard error over documents"
    _lay_out(figure, contributions, title, subtitle, measure, scale, values[places])
    if len(names) > 1:
        figure.update_layout(showlegend=True)
    return figure


def rank_correlation(
    contributions: RoutingContributions,
    component: str,
    receiver: str | int,
    position: str = "rest",
    *,
    label: int = 6,
    scale: Scale = "linear",
) -> go.Figure:
    """Does a routed expert whose scores vary more move the chosen experts further? Variance against AARV, a point for
    each expert of one MoE layer, with Spearman's coefficient.

    Args:
        contributions: by expert, measured with `rank_shift=True`.
        component: the sending MoE layer (`"M1"`).
        receiver: a later one, as `"M3"` or 3.
        position: as for `stripes`.
        label: how many points of the largest variance or AARV to name.
        scale: of both axes; a point at 0 is not on a log scale, but counts for the coefficient.

    Raises:
        ValueError: the result is not by expert or was not measured with `rank_shift=True`; no such layer, receiver or
            position; the receiver does not come after the layer; fewer than three experts.

    Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), section 7.2,
    figures 6 and 27.
    """
    check_by(contributions, "expert", "rank_correlation")
    check_log("variance", scale)
    layers = {g.component: g for g in contributions.senders.groups if g.kind == "experts"}
    if component not in layers:
        raise ValueError(f"there is no MoE layer {component!r} that sends; there are {', '.join(layers)}")
    column = contributions.receiver_index(receiver)
    start = contributions.senders.slice_of(component).start
    run = slice(start, start + layers[component].names[0].count)
    variance, variance_errors = (a[run, column] for a in table(contributions, "variance", position))
    aarv, aarv_errors = (a[run, column] for a in table(contributions, "aarv", position))
    router = contributions.receivers[column]
    if np.isnan(variance).all():
        raise ValueError(f"{router} does not read {component}: name a receiver that comes after it")
    if len(variance) < 3:
        raise ValueError(f"{component} has {len(variance)} experts; a correlation needs three")
    names = contributions.senders[run]
    hover = [
        f"{name}<br>variance {v}<br>AARV {a}"
        for name, v, a in zip(
            names,
            plus_minus(variance, variance_errors, unit("variance")),
            plus_minus(aarv, aarv_errors, unit("aarv")),
            strict=True,
        )
    ]
    figure = go.Figure(
        go.Scatter(
            x=variance,
            y=aarv,
            mode="markers",
            marker=dict(size=8, color=CATEGORIES[0], opacity=0.75, line=dict(width=0.5, color="white")),
            text=hover,
            hovertemplate="%{text}<extra></extra>",
        )
    )
    title = f"Experts of {component} at the router of {router}: {_spearman(variance, aarv)}"
    subtitle = f"{of_tokens(position)}; {len(variance)} experts"
    lay_out(figure, title, with_unit("variance"), with_unit("aarv"), subtitle=subtitle)
    lay_out_chart(figure)
    for update, values in ((figure.update_xaxes, variance), (figure.update_yaxes, aarv)):
        _axis(update, values, scale)
    size = variance / max(variance.max(), 1e-300) + aarv / max(aarv.max(), 1e-300)
    largest = np.argsort(-size, kind="stable")[:label]
    label_points(figure, [(float(variance[i]), float(aarv[i]), names[i], "#1f2933") for i in largest])
    return figure


def _spearman(x: np.ndarray, y: np.ndarray) -> str:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return "Spearman's ρ is undefined (one of them does not vary)"
    result: Any = spearmanr(x, y)
    rho, p = float(result.statistic), float(result.pvalue)
    return f"Spearman's ρ = {rho:.3f}".replace("-", "−") + (", p < 0.001" if p < 0.001 else f", p = {p:.3f}")


def _grey_mass(lines: np.ndarray) -> go.Scatter:
    """All lines as one trace, NaN between them: thousands of experts stay light."""
    columns = np.tile(np.arange(lines.shape[1] + 1, dtype=np.int16), len(lines))
    heights = np.pad(lines, ((0, 0), (0, 1)), constant_values=np.nan).astype(np.float32).ravel()
    # One gap between lines is enough.
    repeated = np.roll(np.isnan(heights), 1) & np.isnan(heights)
    return go.Scatter(
        x=columns[~repeated],
        y=heights[~repeated],
        mode="lines",
        line=dict(width=0.8, color=GREY),
        opacity=0.6,
        hoverinfo="skip",
        showlegend=False,
        name="all others",
    )


def _line(
    contributions: RoutingContributions,
    values: np.ndarray,
    errors: np.ndarray,
    sender: int,
    measure: str,
    colour: str,
    *,
    bars: bool = False,
) -> go.Scatter:
    there = np.flatnonzero(~np.isnan(values[sender]))
    y, error = values[sender, there], errors[sender, there]
    shown = plus_minus(y, error, unit(measure))
    name = contributions.senders[sender]
    return go.Scatter(
        x=there,
        y=y,
        mode="lines+markers",
        line=dict(width=2, color=colour),
        marker=dict(size=5, color=colour),
        error_y=dict(array=np.nan_to_num(error), thickness=1.2, width=3, color=colour) if bars else None,
        text=[
            f"{name} → router of {contributions.receivers[r]}<br>{s}"
            for r, s in zip(there, shown, strict=True)
        ],
        hovertemplate="%{text}<extra></extra>",
        name=name,
        showlegend=bars,
    )


def _lay_out(
    figure: go.Figure,
    contributions: RoutingContributions,
    title: str,
    subtitle: str,
    measure: str,
    scale: Scale,
    values: np.ndarray,
) -> None:
    lay_out(figure, title, "receiving router", with_unit(measure), subtitle=subtitle)
    lay_out_chart(figure)
    figure.update_layout(showlegend=False)
    reached = np.flatnonzero(~np.isnan(values).all(axis=0))
    at_receivers(figure, contributions.receivers, int(reached[0]) if reached.size else 0)
    _axis(figure.update_yaxes, values, scale, from_zero=measure != "overlap")


def _axis(update: Any, values: np.ndarray, scale: Scale, from_zero: bool = True) -> None:
    """An axis as long as the values, with room for names: linear from zero, or log within reason."""
    there = values[values > 0] if scale == "log" else values[~np.isnan(values)]
    if scale == "log":
        high = float(there.max()) if there.size else 1.0
        low = min(max(float(there.min()) if there.size else 0.1, high / 10**_DECADES), high / 1.5)
        pad = 0.05 * np.log10(high / low)
        places, texts = log_ticks(low, high)
        ends = [np.log10(low) - pad, np.log10(high) + 2 * pad]
        update(type="log", range=ends, tickvals=[10**place for place in places], ticktext=texts)
        return
    low, high = (float(there.min()), float(there.max())) if there.size else (0.0, 1.0)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    pad = 0.08 * max(high - low, 1e-12)
    ends = [low - pad if low < 0 or not from_zero else 0.0, high + pad if high > 0 else 0.0]
    update(range=ends, zeroline=from_zero, zerolinecolor=GREY)
