"""Lines over receivers: how far an expert's, or the embedding's, influence reaches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from moe_lens.plots.labels import label_points
from moe_lens.plots.style import (
    CATEGORIES,
    GREY,
    Scale,
    at_receivers,
    fit_axis,
    lay_out,
    lay_out_chart,
    plus_minus,
)
from moe_lens.plots.values import (
    MEASURE_NAMES,
    check_by,
    check_log,
    influence,
    of_tokens,
    table,
    with_unit,
)
from moe_lens.routing.measures import UNITS
from moe_lens.routing.result import RoutingContributions


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
    shown = plus_minus(y, error, UNITS[measure])
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
    fit_axis(figure.update_yaxes, values, scale, from_zero=measure != "overlap")
