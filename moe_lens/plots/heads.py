"""Maps of attention heads: each layer a row, each head a column."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from moe_lens.plots.heatmap import measure_heatmap
from moe_lens.plots.style import Scale, lay_out
from moe_lens.plots.values import MEASURE_NAMES, check_by, of_tokens, partner_of, table
from moe_lens.routing.result import RoutingContributions
from moe_lens.routing.senders import SenderGroup


def head_map(
    contributions: RoutingContributions,
    measure: str,
    receiver: str | int,
    position: str = "rest",
    *,
    scale: Scale = "linear",
) -> go.Figure:
    """What every head adds at one router: `[layer, head]`, blank where the layer comes after it.

    An output bias of attention is no head and not shown.

    Args:
        contributions: by head.
        measure, position, scale: as for `stripes`.
        receiver: a MoE layer, as `"M3"` or 3.

    Raises:
        ValueError: the result is not by head; no such measure, receiver or position; see `stripes`.
    """
    check_by(contributions, "head", "head_map")
    column = contributions.receiver_index(receiver)
    at = {group.component: column for group in _attention(contributions)}
    figure = _map(contributions, measure, position, at, scale)
    title = f"{MEASURE_NAMES[measure]}: each head at the router of {contributions.receivers[column]}"
    _lay_out(figure, contributions, title, of_tokens(position))
    return figure


def own_block_head_map(
    contributions: RoutingContributions, measure: str, position: str = "rest", *, scale: Scale = "linear"
) -> go.Figure:
    """What every head adds at the router of its own block: `[layer, head]`.

    The row of a block that has no MoE layer, or whose router the result does not have, is blank.

    Args:
        contributions: by head.
        measure, position, scale: as for `stripes`.

    Raises:
        ValueError: the result is not by head; no such measure or position; see `stripes`.

    Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), figures 4
    and 18.
    """
    check_by(contributions, "head", "own_block_head_map")
    layers = {group.component: f"M{group.layer}" for group in _attention(contributions)}
    at = {
        component: contributions.receivers.index(router)
        for component, router in layers.items()
        if router in contributions.receivers
    }
    figure = _map(contributions, measure, position, at, scale)
    title = f"{MEASURE_NAMES[measure]}: each head at the router of its own block"
    blank = [component for component in layers if component not in at]
    note = f"; blank: no router of that block here ({', '.join(blank)})" if blank else ""
    _lay_out(figure, contributions, title, of_tokens(position) + note)
    return figure


def _attention(contributions: RoutingContributions) -> list[SenderGroup]:
    return [group for group in contributions.senders.groups if group.kind == "heads"]


def _n_heads(group: SenderGroup) -> int:
    return group.names[0].count


def _map(
    contributions: RoutingContributions, measure: str, position: str, at: Mapping[str, int], scale: Scale
) -> go.Figure:
    """Heads of each component at the receiver (a column of the table) that `at` gives it."""
    groups = _attention(contributions)
    shape = len(groups), max(map(_n_heads, groups))

    def cells_of(values: np.ndarray) -> np.ndarray:
        cells = np.full(shape, np.nan)
        for row, group in enumerate(groups):
            if group.component in at:
                start, n = contributions.senders.slice_of(group.component).start, _n_heads(group)
                cells[row, :n] = values[start : start + n, at[group.component]]
        return cells

    values, errors = table(contributions, measure, position)
    shared = partner_of(measure)
    names = [
        [
            f"{group.component}H{head} → router of {contributions.receivers[at[group.component]]}"
            if group.component in at
            else ""
            for head in range(shape[1])
        ]
        for group in groups
    ]
    return measure_heatmap(
        measure,
        cells_of(values),
        cells_of(errors),
        rows=[group.component for group in groups],
        columns=[f"H{head}" for head in range(shape[1])],
        what="%{text}",
        names=names,
        partner=None if shared is None else cells_of(table(contributions, shared, position)[0]),
        scale=scale,
    )


def _lay_out(figure: go.Figure, contributions: RoutingContributions, title: str, subtitle: str) -> None:
    n_rows = len(_attention(contributions))
    lay_out(figure, title, "head", "attention layer", n_rows=n_rows, subtitle=subtitle)
