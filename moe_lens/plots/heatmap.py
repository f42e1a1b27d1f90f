"""A heatmap of one measure: colours, blanks, hover with standard errors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from moe_lens.plots.style import BLANK, Scale
from moe_lens.plots.values import colours
from moe_lens.routing.measures import UNITS

Cells = Float[np.ndarray, "row column"]


def measure_heatmap(
    measure: str,
    cells: Cells,
    errors: Cells,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    what: str,
    names: Sequence[Sequence[str]] | None = None,
    partner: Cells | None = None,
    scaled: Cells | None = None,
    scale: Scale = "linear",
) -> go.Figure:
    """Rows from the first at the top, as the stream passes them; still to be laid out.

    Args:
        what: the hover's first line, a template of `%{x}`, `%{y}` and, with `names`, `%{text}`.
        names: of each cell.
        partner: the same cells of the measure that shares the colours.
        scaled: the cells that the colours are wide enough for, where not for all.
        scale: `log` colours by log10; a cell of 0 then has no colour, and its hover says so.
    """
    coloured = colours(measure, cells if scaled is None else scaled, partner, scale)
    z = cells
    if scale == "log":
        z = np.full(cells.shape, np.nan)
        np.log10(cells, out=z, where=cells > 0)
    unit = f" {UNITS[measure]}".rstrip()
    error = "" if np.isnan(errors).all() else " ± %{customdata[1]:.2g}"
    text = None if names is None else [list(row) for row in names]
    shared = dict(x=list(columns), y=list(rows), text=text, xgap=1, ygap=1, hoverongaps=False)
    figure = go.Figure(
        go.Heatmap(
            z=z,
            customdata=np.stack([cells, errors], axis=-1),
            hovertemplate=f"{what}<br>%{{customdata[0]:.4g}}{error}{unit}<extra></extra>",
            **shared,
            **coloured,
        )
    )
    if scale == "log" and (cells == 0).any():
        figure.add_trace(
            go.Heatmap(
                z=np.where(cells == 0, 0.0, np.nan),
                colorscale=[[0, BLANK], [1, BLANK]],
                showscale=False,
                hovertemplate=f"{what}<br>0{unit}: no logarithm<extra></extra>",
                **shared,
            )
        )
    figure.update_xaxes(type="category", nticks=0 if len(columns) <= 40 else 32)
    figure.update_yaxes(type="category", autorange="reversed")
    return figure
