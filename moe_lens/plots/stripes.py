"""Stripes: which senders shape which routers."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from moe_lens.plots.heatmap import measure_heatmap
from moe_lens.plots.style import Scale, lay_out
from moe_lens.plots.values import MEASURE_NAMES, of_tokens, partner_of, table
from moe_lens.routing.result import RoutingContributions
from moe_lens.routing.senders import ROUNDING, Senders

MOST_SENDERS = 400
"""More columns than this can no longer be told apart."""

_KINDS = {"attention": "A", "mlp": "M"}


def stripes(
    contributions: RoutingContributions,
    measure: str,
    position: str = "rest",
    *,
    scale: Scale = "linear",
    senders: str | Sequence[str] | None = None,
    when_active: bool = False,
) -> go.Figure:
    """A heatmap of one measure: each column a sender, each row a router that reads it.

    A sender that shapes many later routers shows as a vertical stripe. Variance, norm and AARV have a sequential
    scale from 0, the overlap one down from 1. APS and ANS share one that is centred on zero, so that their colours
    compare.

    Args:
        measure: any that the result has (`contributions.measures`).
        position: `lead`, the first token of each document, or `rest`.
        scale: `log` colours by log10, for measures that are never negative; cells of 0 are then blank, and half
            precision's `rounding`, orders of magnitude below all others, may have less than the lightest colour says.
        senders: `attention`, `mlp` (MoE and dense layers), or names of senders or of components; None is all.
        when_active: means over the tokens where the sender is active.

    Raises:
        ValueError: no such measure, position or sender; a log scale of a signed measure; over 400 senders.

    Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), figures 3
    and 7 to 13, of the norm figure 24.
    """
    values, errors = table(contributions, measure, position, when_active)
    chosen = chosen_senders(contributions.senders, senders)
    if len(chosen) > MOST_SENDERS:
        raise ValueError(
            f"{len(chosen):,} senders are more than the {MOST_SENDERS} columns that can be told apart; name some with "
            f"senders=, list the largest with contributions.top(receiver), or draw experts with expert_lines"
        )
    shared = partner_of(measure)
    partner = None if shared is None else table(contributions, shared, position, when_active)[0][chosen, :].T
    components = [i for i in chosen if contributions.senders[i] != ROUNDING]
    figure = measure_heatmap(
        measure,
        values[chosen, :].T,
        errors[chosen, :].T,
        rows=contributions.receivers,
        columns=[contributions.senders[i] for i in chosen],
        what="%{x} → router of %{y}",
        partner=partner,
        scaled=values[components or chosen, :].T if scale == "log" else None,
        scale=scale,
    )
    kind = {"attention": " (attention)", "mlp": " (MoE and dense)"}.get(
        senders if isinstance(senders, str) else "", ""
    )
    title = f"{MEASURE_NAMES[measure]}, {of_tokens(position, when_active)}"
    lay_out(figure, title, f"sender{kind}", "receiving router", n_rows=len(contributions.receivers))
    return figure


def chosen_senders(senders: Senders, chosen: str | Sequence[str] | None) -> list[int]:
    """The places of the senders asked for, each once.

    Raises:
        ValueError: there is no such sender or component, or none at all was asked for.
    """
    if chosen is None:
        return list(range(len(senders)))
    if isinstance(chosen, str) and chosen in _KINDS:
        names = [g.component for g in senders.groups if g.component.startswith(_KINDS[chosen])]
        wanted = f"{chosen} senders"
    else:
        names = [chosen] if isinstance(chosen, str) else list(chosen)
        wanted = "senders that were asked for"
    components = {group.component for group in senders.groups}
    places: dict[int, None] = {}
    for name in names:
        run = senders.slice_of(name) if name in components else None
        found = [senders.index(name)] if run is None else range(run.start, run.stop)
        places |= dict.fromkeys(found)
    if not places:
        raise ValueError(f"there are no {wanted}; there are {', '.join(components)}")
    return list(places)
