"""How figures look: fonts, colours, scales, colour bars, layout; and text from outside, shown literally."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

FONT = "Inter, 'Helvetica Neue', Helvetica, Arial, sans-serif"
INK, MUTED, GRID, BLANK = "#1f2933", "#61707f", "#e3e8ee", "#dde2e7"
"""BLANK is darker than the scales' lightest colours: no value is not a small value."""
GREY = "#b8c2cc"

# Light to dark, one hue, and blue through near-white to red: both keep their order in grey, and for the colour-blind.
SEQUENTIAL = [[0.0, "#f3f7fb"], [0.25, "#c3d9ec"], [0.5, "#7fb0d6"], [0.75, "#3577b1"], [1.0, "#0b3c6f"]]
DIVERGING = [[0.0, "#1c5a9a"], [0.25, "#86b4d8"], [0.5, "#f8f8f7"], [0.75, "#e8967a"], [1.0, "#a8231c"]]
POSITIVE, NEGATIVE = "#b8402f", "#3577b1"
"""For signed bars: hues of the diverging scale's two sides."""

# After Okabe and Ito, told apart by the colour-blind; without yellow, which is too light for a line.
CATEGORIES = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00",
    "#5b3a8c", "#8c4a1f", "#1f2933", "#7a9a01", "#a8231c", "#3fb8a9",
)  # fmt: skip

Scale = Literal["linear", "log"]

_DECADES = 6
"""A log axis shows no more than these; smaller values lie below it."""


def literal(text: object) -> str:
    """Text that plotly shows as it is: neither tags nor entities are read in it, and a character that does not print
    (a line break, say) is shown as Python writes it."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def check_scale(scale: str) -> None:
    """Raises:
    ValueError: it is neither linear nor log.
    """
    if scale not in ("linear", "log"):
        raise ValueError(f"scale must be linear or log, not {scale!r}")


def largest(*cells: np.ndarray) -> float:
    """The largest size of a value; a scale needs some width even where all are zero (or there is none)."""
    sizes = [float(np.abs(part[~np.isnan(part)]).max()) for part in cells if (~np.isnan(part)).any()]
    return max(*sizes, 1e-12) if sizes else 1.0


def sequential(cells: np.ndarray) -> dict[str, Any]:
    """Colours from zero up."""
    return dict(colorscale=SEQUENTIAL, zmin=0.0, zmax=largest(cells))


def diverging(*cells: np.ndarray) -> dict[str, Any]:
    """Colours centred on zero, and wide enough for all of these."""
    bound = largest(*cells)
    return dict(colorscale=DIVERGING, zmin=-bound, zmax=bound, zmid=0.0)


def log_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Places (log10) and texts of marks between two values: powers of ten, or 1, 2, 5 where there are few of them."""
    first, last = int(np.ceil(np.log10(low) - 1e-9)), int(np.floor(np.log10(high) + 1e-9))
    if last - first >= 2:
        step = -(-(last - first + 1) // 8)
        powers = range(first, last + 1, step)
        return [float(p) for p in powers], [f"10<sup>{p}</sup>".replace("-", "−") for p in powers]
    marks = [d * 10.0**p for p in range(first - 1, last + 1) for d in (1, 2, 5)]
    marks = [m for m in marks if low * (1 - 1e-9) <= m <= high * (1 + 1e-9)] or [low, high]
    return [float(np.log10(m)) for m in marks], [f"{m:.3g}" for m in marks]


def colorbar(title: str, **changes: Any) -> dict[str, Any]:
    """A thin colour bar, its unit above it."""
    return (
        dict(
            title=dict(text=title, side="top", font=dict(size=11, color=MUTED)),
            thickness=10,
            outlinewidth=0,
            tickfont=dict(size=11, color=MUTED),
            ticks="",
            len=1.0,
        )
        | changes
    )


def layout_of(figure: go.Figure) -> Any:
    """Its layout, of which type checkers know nothing."""
    return figure.layout


def lay_out(
    figure: go.Figure,
    title: str,
    x_title: str,
    y_title: str,
    *,
    n_rows: int | None = None,
    height: int = 420,
    subtitle: str = "",
) -> None:
    """Fonts, margins and axes; a figure of rows is as high as they need."""
    axis: dict[str, Any] = dict(
        showgrid=False,
        zeroline=False,
        ticks="",
        tickfont=dict(size=11, color=MUTED),
        title=dict(font=dict(size=12, color=MUTED), standoff=8),
    )
    rows_height = height if n_rows is None else 110 + max(150, min(26 * n_rows, 900))
    heading: dict[str, Any] = dict(text=title, font=dict(size=14, color=INK), x=0, xref="container", y=0.97)
    if subtitle:
        # Placed from the top in pixels, so that a low and a high figure have the same heading.
        rows_height += 26
        heading["y"] = 1 - 16 / rows_height
        heading["subtitle"] = dict(text=subtitle, font=dict(size=12, color=MUTED))
    figure.update_layout(
        title=heading | dict(pad=dict(l=4)),
        font=dict(family=FONT, color=INK),
        margin=dict(l=56, r=8, t=70 if subtitle else 44, b=52),
        height=rows_height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor=BLANK,
        hoverlabel=dict(bgcolor="white", bordercolor=GRID, font=dict(family=FONT, size=12, color=INK)),
    )
    figure.update_xaxes(**axis, title_text=x_title)
    figure.update_yaxes(**axis, title_text=y_title)


def lay_out_chart(figure: go.Figure) -> None:
    """What points and lines have beyond `lay_out`: a white ground with a light grid."""
    figure.update_layout(plot_bgcolor="rgba(0,0,0,0)", margin_r=20)
    lines: dict[str, Any] = dict(
        showgrid=True, gridcolor=GRID, linecolor=GREY, showline=True, exponentformat="power"
    )
    figure.update_xaxes(**lines)
    figure.update_yaxes(**lines)


def at_receivers(figure: go.Figure, receivers: Sequence[str], first: int = 0) -> None:
    """An x axis of receivers at 0, 1, ..., shown from one of them on: numbers are lighter than names where there are
    many points."""
    step = -(-(len(receivers) - first) // 24)
    places = list(range(first, len(receivers), step))
    figure.update_xaxes(
        tickvals=places, ticktext=[receivers[i] for i in places], range=[first - 0.4, len(receivers) - 0.4]
    )


def fit_axis(update: Any, values: np.ndarray, scale: Scale, from_zero: bool = True) -> None:
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


def plus_minus(values: np.ndarray, errors: np.ndarray, unit: str) -> list[str]:
    """For hovering: each value with its standard error, where it has one, and its unit."""
    return [
        (f"{v:.4g}" + ("" if np.isnan(e) else f" ± {e:.2g}") + f" {unit}").rstrip()
        for v, e in zip(values.ravel(), errors.ravel(), strict=True)
    ]
