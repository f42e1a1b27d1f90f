"""Does variance tell which expert moves the choice? A scatter with a rank correlation."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from moe_lens.plots.labels import label_points
from moe_lens.plots.style import CATEGORIES, INK, Scale, fit_axis, lay_out, lay_out_chart, plus_minus
from moe_lens.plots.values import check_by, check_log, of_tokens, table, with_unit
from moe_lens.routing.measures import UNITS
from moe_lens.routing.queries import RankCorrelation, variance_rank_correlation
from moe_lens.routing.result import RoutingContributions


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
    found = variance_rank_correlation(contributions, component, receiver, position)
    names = contributions.senders[run]
    hover = [
        f"{name}<br>variance {v}<br>AARV {a}"
        for name, v, a in zip(
            names,
            plus_minus(variance, variance_errors, UNITS["variance"]),
            plus_minus(aarv, aarv_errors, UNITS["aarv"]),
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
    title = f"Experts of {component} at the router of {router}: {_spearman(found)}"
    subtitle = f"{of_tokens(position)}; {len(variance)} experts"
    lay_out(figure, title, with_unit("variance"), with_unit("aarv"), subtitle=subtitle)
    lay_out_chart(figure)
    for update, values in ((figure.update_xaxes, variance), (figure.update_yaxes, aarv)):
        fit_axis(update, values, scale)
    size = variance / max(variance.max(), 1e-300) + aarv / max(aarv.max(), 1e-300)
    largest = np.argsort(-size, kind="stable")[:label]
    label_points(figure, [(float(variance[i]), float(aarv[i]), names[i], INK) for i in largest])
    return figure


def _spearman(found: RankCorrelation) -> str:
    if np.isnan(found.rho):
        return "Spearman's ρ is undefined (one of them does not vary)"
    p = "p < 0.001" if found.p_value < 0.001 else f"p = {found.p_value:.3f}"
    return f"Spearman's ρ = {found.rho:.3f}".replace("-", "−") + f", {p}"
