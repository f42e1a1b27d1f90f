"""Names at points, moved apart where they would lie on each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from moe_lens.plots.style import layout_of

# Of a figure as wide as a page, in pixels; its real width is not known, and only nearness matters.
_WIDTH, _LINE, _LETTER = 760, 14, 7.5
_OFFSETS = [dy for step in range(1, 12) for dy in (-step * _LINE, (step - 1) * _LINE)]

Point = tuple[float, float, str, str]
"""x, y, text (already literal), colour."""


def label_points(figure: go.Figure, points: Sequence[Point], *, below: bool = False) -> None:
    """Annotate points of a laid-out chart, above them if there is room (or below), the first ones nearest."""
    offsets = [-dy for dy in _OFFSETS] if below else _OFFSETS
    boxes: list[tuple[float, float, float]] = []
    for x, y, text, colour in points:
        left, top = _pixels(figure, x, y)
        width = _LETTER * len(text)
        # At the right edge a name stands left of its point.
        side = -1 if left + width + 10 > _WIDTH else 1
        start = left + 6 if side == 1 else left - 6 - width
        shift = next((dy for dy in offsets if not _hit(boxes, start, top + dy, width)), offsets[0])
        boxes.append((start, top + shift, width))
        figure.add_annotation(
            x=_on_axis(layout_of(figure).xaxis.type, x),
            y=_on_axis(layout_of(figure).yaxis.type, y),
            text=text,
            font=dict(size=11, color=colour),
            ax=(18 if abs(shift) > _LINE else 6) * side,
            ay=shift,
            xanchor="left" if side == 1 else "right",
            yanchor="middle",
            showarrow=True,
            arrowhead=0,
            arrowwidth=0.7,
            arrowcolor=colour if abs(shift) > _LINE else "rgba(0,0,0,0)",
            bgcolor="rgba(255,255,255,0.7)",
            borderpad=0,
        )


def _hit(boxes: Sequence[tuple[float, float, float]], left: float, top: float, width: float) -> bool:
    return any(
        abs(top - other_top) < _LINE and left < other_left + other_width and other_left < left + width
        for other_left, other_top, other_width in boxes
    )


def _pixels(figure: go.Figure, x: float, y: float) -> tuple[float, float]:
    """About where a point will be, from the top left."""
    data = [(trace.x, trace.y) for trace in figure.data]  # type: ignore[attr-defined]
    height = layout_of(figure).height - layout_of(figure).margin.t - layout_of(figure).margin.b
    places = []
    for value, axis, arrays in ((x, layout_of(figure).xaxis, 0), (y, layout_of(figure).yaxis, 1)):
        value = _on_axis(axis.type, value)
        if axis.range is not None:
            low, high = axis.range
        else:
            all_values = np.concatenate([np.asarray(pair[arrays], dtype=float) for pair in data])
            all_values = all_values[np.isfinite(all_values)]
            low, high = min(0.0, all_values.min()), max(0.0, all_values.max()) * 1.05
        places.append((value - low) / (high - low) if high > low else 0.5)
    return places[0] * _WIDTH, (1 - places[1]) * height


def _on_axis(kind: str | None, value: float) -> float:
    """Where annotations count: a log axis in log10."""
    return float(np.log10(value)) if kind == "log" and value > 0 else float(value)
