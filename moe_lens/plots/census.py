"""Figures of a census: what becomes of the loss, and how large the change was, by layer and by rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Bool, Float, Int
from plotly.colors import sample_colorscale

from moe_lens.audit.census_table import Census
from moe_lens.interventions.arguments import Layers, layer_numbers
from moe_lens.plots.style import (
    CATEGORIES,
    INK,
    MUTED,
    SEQUENTIAL,
    Scale,
    at_receivers,
    check_scale,
    fit_axis,
    lay_out,
    lay_out_chart,
    literal,
    plus_minus,
)

Statistic = Literal["mean", "median", "p5", "p95"]
By = Literal["layer", "rank"]
Table = dict[str, np.ndarray]
"""Arrays of equal length, by the column's name."""

_NAMES = {
    "delta_loss": "change of the loss",
    "gap_norm": "gap norm",
    "routing_weight": "routing weight",
}
_UNITS = {"delta_loss": "nats", "gap_norm": "", "routing_weight": ""}
_STATISTICS = {"mean": "mean", "median": "Median", "p5": "5th percentile", "p95": "95th percentile"}
_OF_SCOPES = {"token": "at one token", "sequence": "wherever active"}

LINEAR_BELOW = 1e-3
"""Nats; the axis of a distribution is about linear within this of zero, and logarithmic beyond."""

_BIN = 0.1  # of that axis, where a decade is 1
_MOST_LINES = 24


def census_lines(
    census: Census | pd.DataFrame,
    column: str = "delta_loss",
    *,
    statistic: Statistic = "mean",
    by: By = "rank",
    scale: Scale = "linear",
) -> go.Figure:
    """A column of a census over the layers: a line for each rank, the heaviest in the darkest colour and the shared
    experts dashed; or one line over all routed experts. Means have bars, their standard errors over documents.

    Args:
        census: or its `by_rank()` or `by_layer()`, whichever `by` says.
        column: `delta_loss`, `gap_norm` or `routing_weight`.
        statistic: `mean`; of `delta_loss` also `median`, `p5`, `p95`.
        by: `rank` or `layer`.
        scale: `log` for the columns that are never negative.

    Raises:
        ValueError: no such column or statistic; a frame that is not that of `by`; a census without rows; a log scale of
            the change of the loss.

    Source: gap norm and functional importance of "From Observation to Intervention: A Causal Audit of Expert Importance
    in Mixture-of-Experts Models" (arXiv:2606.10703), section 2, here at every token.
    """
    _check(column, statistic, by, scale)
    table = _summary_of(census, column, by)
    name = column if statistic == "mean" else f"{column}_{statistic}"
    layers = np.unique(table["layer"])
    figure = go.Figure()
    for label, colour, dash, chosen in _lines(table, by):
        rows = {key: values[chosen] for key, values in table.items()}
        values = rows[name]
        errors = rows[f"{column}_standard_error"] if statistic == "mean" else None
        shown = plus_minus(values, np.full(len(values), np.nan) if errors is None else errors, _UNITS[column])
        figure.add_trace(
            go.Scatter(
                x=np.searchsorted(layers, rows["layer"]),
                y=values,
                mode="lines+markers",
                line=dict(width=2, color=colour, dash=dash),
                marker=dict(size=5, color=colour),
                error_y=None
                if errors is None
                else dict(array=np.nan_to_num(errors), thickness=1.2, width=3, color=colour),
                text=[
                    f"M{layer}, {label}<br>{value}<br>{n:,} ablations"
                    for layer, value, n in zip(rows["layer"], shown, rows["n_rows"], strict=True)
                ],
                hovertemplate="%{text}<extra></extra>",
                name=label,
            )
        )
    what = (
        f"Mean {_NAMES[column]}"
        if statistic == "mean"
        else f"{_STATISTICS[statistic]} of the {_NAMES[column]}"
    )
    lay_out(
        figure,
        f"{what} at each layer{', by rank' if by == 'rank' else ''}",
        "MoE layer",
        f"{_NAMES[column]} ({_UNITS[column] or 'no unit'})",
        subtitle=_subtitle(census, int(table["n_rows"].sum()), int(table["n_documents"].max()), statistic),
    )
    lay_out_chart(figure)
    _legend(figure)
    at_receivers(figure, [f"M{layer}" for layer in layers])
    fit_axis(figure.update_yaxes, _with_bars(table, name, column, statistic, scale), scale)
    return figure


def loss_change_distribution(
    census: Census | pd.DataFrame, *, by: By = "rank", layers: Layers = None
) -> go.Figure:
    """How the changes of the loss are distributed: the share of ablations in bins of equal width on an axis that is
    about linear within 0.001 nats of zero and logarithmic beyond, with a line for each rank or layer. A bin is a tenth
    of a decade wide, or three or five tenths where there are few ablations.

    Args:
        census: or rows of it, with the columns `layer`, `rank` and `delta_loss`.
        by: `rank`, over all layers, or `layer`, over routed experts.
        layers: those whose rows are counted; None is all.

    Raises:
        ValueError: a frame without these columns; no such layer; no rows; no such `by`.
    """
    if by not in ("layer", "rank"):
        raise ValueError(f"by must be layer or rank, not {by!r}")
    counts: Counts = {}
    n_documents = 0
    for rows in _rows(census, layers):
        bins = np.rint(_on_axis(rows["delta_loss"].astype(float)) / _BIN).astype(int)
        if "document" in rows:
            n_documents = max(n_documents, len(np.unique(rows["document"])))
        groups = rows[by].astype(int)
        if by == "layer":
            bins, groups = bins[rows["rank"] > 0], groups[rows["rank"] > 0]
        for group in np.unique(groups):
            counted = np.bincount(bins[groups == group] + _MIDDLE, minlength=2 * _MIDDLE + 1)
            counts[int(group)] = counts.get(int(group), np.zeros(2 * _MIDDLE + 1, int)) + counted
    if not counts:
        raise ValueError("there are no rows whose changes could be counted")
    counts, width = _wide_enough(counts)
    middle = len(next(iter(counts.values()))) // 2
    used = np.flatnonzero(np.any([counted > 0 for counted in counts.values()], axis=0))
    reach = max(int(np.abs(used - middle).max()), 1)
    window = slice(middle - reach, middle + reach + 1)
    centres = np.arange(-reach, reach + 1) * width
    edges = [_off_axis(centres - width / 2), _off_axis(centres + width / 2)]
    bounds = [f"{low:.2g} to {high:.2g} nats".replace("-", "−") for low, high in zip(*edges, strict=True)]
    figure, heights = go.Figure(), []
    for label, colour, dash, group in _groups(sorted(counts), by):
        counted = counts[group][window]
        share = np.where(counted > 0, 100 * counted / counted.sum(), np.nan)
        heights.append(share)
        figure.add_trace(
            go.Scatter(
                x=centres,
                y=share,
                mode="lines+markers",
                line=dict(width=1.5, color=colour, dash=dash),
                marker=dict(size=3, color=colour),
                text=[
                    f"{label}: {bound}<br>{n:,} ablations, {s:.3g}%"
                    for bound, n, s in zip(bounds, counted, share, strict=True)
                ],
                hovertemplate="%{text}<extra></extra>",
                name=label,
            )
        )
    n_rows = sum(int(counted.sum()) for counted in counts.values())
    lay_out(
        figure,
        f"Distribution of the change of the loss, by {by}",
        "change of the loss (nats; linear near 0, logarithmic beyond)",
        "ablations in a bin (%)",
        subtitle=_subtitle(census, n_rows, n_documents),
    )
    lay_out_chart(figure)
    _legend(figure)
    _axis_of_changes(figure, (reach + 1) * width)
    fit_axis(figure.update_yaxes, np.stack(heights), "log")
    return figure


# ---- what is asked for ----


def _check(column: str, statistic: str, by: str, scale: str) -> None:
    check_scale(scale)
    if column not in _NAMES:
        raise ValueError(f"column must be one of {', '.join(_NAMES)}, not {column!r}")
    if statistic not in _STATISTICS:
        raise ValueError(f"statistic must be one of {', '.join(_STATISTICS)}, not {statistic!r}")
    if statistic != "mean" and column != "delta_loss":
        raise ValueError(f"of {column} there is the mean, and no {statistic}")
    if by not in ("layer", "rank"):
        raise ValueError(f"by must be layer or rank, not {by!r}")
    if scale == "log" and column == "delta_loss":
        raise ValueError("delta_loss has no log scale: a loss may rise or fall")


def _summary_of(census: Census | pd.DataFrame, column: str, by: str) -> Table:
    summaries = {"rank": Census.by_rank, "layer": Census.by_layer}
    frame = summaries[by](census) if isinstance(census, Census) else census
    table = {str(name): frame[name].to_numpy() for name in frame.columns}
    needed = {"layer", "n_rows", "n_documents", column, f"{column}_standard_error"}
    if not needed <= table.keys() or ("rank" in table) != (by == "rank"):
        raise ValueError(f"by={by!r} shows a Census or its by_{by}(), not a frame of {', '.join(table)}")
    if len(frame) == 0:
        raise ValueError("the census has no rows to show")
    order = np.argsort(table["layer"], kind="stable")
    return {name: values[order] for name, values in table.items()}


def _rows(census: Census | pd.DataFrame, layers: Layers) -> Iterator[Table]:
    """The rows, a layer at a time where they come from the disk."""
    wanted = None if layers is None else list(layer_numbers(layers))
    if isinstance(census, Census):
        names = ["document", "layer", "rank", "delta_loss"]
        for layer in census.layers if wanted is None else wanted:
            rows = census.to_pandas(names, layers=layer)
            yield {name: rows[name].to_numpy() for name in names}
        return
    needed = ["layer", "rank", "delta_loss"]
    lacking = [name for name in needed if name not in census]
    if lacking:
        raise ValueError(f"rows of a census are needed, and the frame has no {', '.join(lacking)}")
    there = census["layer"].to_numpy()
    for layer in wanted or ():
        if layer not in there:
            raise ValueError(f"the frame has no rows of layer {layer!r}")
    chosen = np.ones(len(there), bool) if wanted is None else np.isin(there, wanted)
    names = [name for name in ("document", *needed) if name in census]
    yield {name: census[name].to_numpy()[chosen] for name in names}


# ---- lines and their colours ----


def _groups(numbers: Sequence[int], by: str) -> list[tuple[str, str, str, int]]:
    """Label, colour, dash and number of each rank or layer."""
    numbers = [
        *(n for n in numbers if n > 0 or by == "layer"),
        *(n for n in numbers if n == 0 and by == "rank"),
    ]
    colours = _shades(len(numbers))
    found = []
    for colour, number in zip(colours, numbers, strict=True):
        if by == "layer":
            found.append((f"M{number}", colour, "solid", number))
        elif number == 0:
            found.append(("shared experts", CATEGORIES[1], "dash", number))
        else:
            found.append((f"rank {number}", colour, "solid", number))
    return found


def _lines(table: Table, by: str) -> Iterator[tuple[str, str, str, Bool[np.ndarray, " row"]]]:
    if by == "layer":
        yield "all routed experts", INK, "solid", np.ones(len(table["layer"]), bool)
        return
    for label, colour, dash, rank in _groups(np.unique(table["rank"]).tolist(), by):
        yield label, colour, dash, table["rank"] == rank


def _shades(n: int) -> list[str]:
    """From the darkest on, all dark enough for a line."""
    places = np.linspace(1.0, 0.35, max(n, 2))[:n]
    return [str(colour) for colour in sample_colorscale(SEQUENTIAL, places.tolist())]


def _legend(figure: go.Figure) -> None:
    n_lines = len(figure.data)  # type: ignore[arg-type]
    figure.update_layout(showlegend=1 < n_lines <= _MOST_LINES, legend=dict(font=dict(size=11)))


def _subtitle(
    census: Census | pd.DataFrame, n_rows: int, n_documents: int, statistic: Statistic | None = None
) -> str:
    parts = []
    if isinstance(census, Census):
        identity = census.identity
        if "how" in identity and "scope" in identity:
            scope = _OF_SCOPES.get(identity["scope"], literal(identity["scope"]))
            parts.append(f"{literal(identity['how'])} {scope}")
    counted = f"{n_rows:,} ablations"
    if n_documents:
        counted += f" in {n_documents:,} document{'s' if n_documents != 1 else ''}"
    if statistic == "mean" and n_documents > 1:
        counted += ", with standard errors"
    parts.append(counted)
    return "; ".join(parts)


# ---- axes ----

_MIDDLE = 202
"""The bin of zero. The axis goes up to 10^17 nats, so that every change of a loss has a bin; and its 405 bins can be
put together by three and by five, with zero in the middle of one again."""


Counts = dict[int, Int[np.ndarray, " bin"]]


def _wide_enough(counts: Counts) -> tuple[Counts, float]:
    """Bins put together where a line has few ablations to show, an odd number of them so that zero stays in the middle;
    and how wide they are on the axis."""
    least = min(int(counted.sum()) for counted in counts.values())
    together = 1 if least >= 3000 else 3 if least >= 500 else 5
    merged = {group: counted.reshape(-1, together).sum(axis=1) for group, counted in counts.items()}
    return merged, _BIN * together


def _on_axis(change: Float[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    return np.sign(change) * np.log10(1 + np.abs(change) / LINEAR_BELOW)


def _off_axis(place: Float[np.ndarray, " row"]) -> Float[np.ndarray, " row"]:
    return np.sign(place) * LINEAR_BELOW * (10.0 ** np.abs(place) - 1)


def _axis_of_changes(figure: go.Figure, reach: float) -> None:
    largest = float(_off_axis(np.array([reach]))[0])
    sizes = [10.0**power for power in range(-2, 15) if 10.0**power <= largest]
    marks = [*(-size for size in reversed(sizes)), 0.0, *sizes]
    figure.update_xaxes(
        tickvals=_on_axis(np.array(marks)).tolist(),
        ticktext=[f"{mark:g}".replace("-", "−") for mark in marks],
        range=[-reach, reach],
        tickangle=0,
        zeroline=True,
        zerolinewidth=1,
        zerolinecolor=MUTED,
    )


def _with_bars(
    table: Table, name: str, column: str, statistic: str, scale: Scale
) -> Float[np.ndarray, " value"]:
    """The values that the axis must reach: the ends of the bars, where there are any."""
    values = table[name]
    if statistic != "mean":
        return values
    errors = np.nan_to_num(table[f"{column}_standard_error"])
    # On a log scale a bar's lower end may be anywhere.
    return np.concatenate([values if scale == "log" else values - errors, values + errors])
