"""Maps of source tokens: what a head adds to a router out of one token, and how much it attends to it."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from moe_lens.plots.heatmap import measure_heatmap
from moe_lens.plots.style import MUTED, colorbar, lay_out, layout_of, literal, sequential
from moe_lens.plots.values import MEASURE_NAMES, check_by, of_tokens, partner_of, table
from moe_lens.routing.result import RoutingContributions
from moe_lens.routing.senders import SOURCE_AXES

HeadMap = Float[np.ndarray, "layer head"]


def source_maps(
    score_variance: HeadMap, attention: HeadMap, *, query: str, key: str, receiver: str | int
) -> go.Figure:
    """Side by side, for one pair of tokens: the variance of what each head carries from the key to the receiver's
    router at the query, and how much it attends from the query to the key.

    Args:
        score_variance: in logits^2; NaN where the layer comes after the receiver.
        attention: the weights A[query, key].
        query, key: the tokens (or what to call them, END and IO, say); shown literally.
        receiver: a MoE layer, as `"M3"` or 3.

    Raises:
        ValueError: the two are not `[layer, head]` of one shape.

    Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), figure 17.
    """
    maps = [np.asarray(values, dtype=float) for values in (score_variance, attention)]
    if maps[0].ndim != 2 or maps[0].shape != maps[1].shape:
        raise ValueError(
            f"both maps must be [layer, head]; their shapes are {maps[0].shape} and {maps[1].shape}"
        )
    router = literal(f"M{receiver}" if isinstance(receiver, int) else receiver)
    titles = (f"Variance of scores at the router of {router}", "Attention weight")
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.16, subplot_titles=titles)
    n_layers, n_heads = maps[0].shape
    domains = [layout_of(figure)[name].domain for name in ("xaxis", "xaxis2")]
    for i, (cells, unit, domain) in enumerate(zip(maps, ("logits²", ""), domains, strict=True)):
        figure.add_trace(
            go.Heatmap(
                z=cells,
                x=[f"H{head}" for head in range(n_heads)],
                y=[f"A{layer}" for layer in range(n_layers)],
                xgap=1,
                ygap=1,
                hoverongaps=False,
                hovertemplate=f"%{{y}}%{{x}}<br>%{{z:.4g}} {unit}<extra></extra>",
                colorbar=colorbar(unit, x=domain[1] + 0.01, xanchor="left"),
                **sequential(cells),
            ),
            row=1,
            col=i + 1,
        )
    title = f"From the key “{literal(key)}” to the query “{literal(query)}”, by head"
    lay_out(figure, title, "head", "", n_rows=n_layers)
    figure.update_annotations(font=dict(size=12, color=MUTED))
    figure.update_layout(margin_t=76, height=layout_of(figure).height + 32)
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_yaxes(title_text="attention layer", row=1, col=1)
    return figure


def source_heatmap(
    contributions: RoutingContributions,
    sender: str,
    receiver: str | int | None = None,
    measure: str = "variance",
    position: str = "rest",
) -> go.Figure:
    """Out of which tokens an attention layer's heads reach a router: `[head, source]`; or, for one head, `[receiver,
    source]`.

    A mean is over the tokens that can see the source, and over documents that have such a one: a late position is
    seen by near tokens only.

    Args:
        contributions: by source; its sources are positions in the document, or offsets back from the query.
        sender: an attention layer (`"A3"`) or a head (`"A3H5"`).
        receiver: a MoE layer, as `"M3"` or 3; for a head, None is all routers.
        measure, position: as for `stripes`.

    Raises:
        ValueError: the result is not by source; no such layer, head, receiver, measure or position.
    """
    check_by(contributions, "source", "source_heatmap")
    layers = {g.component: g for g in contributions.senders.groups if g.kind == "sources"}
    layer, letter, head = sender.partition("H")
    if layer not in layers:
        raise ValueError(f"there is no attention layer {sender!r}; there are {', '.join(layers)}")
    (_, n_heads), (label, n_sources) = layers[layer].names[0].axes
    if letter and head not in map(str, range(n_heads)):
        raise ValueError(f"there is no head {sender!r}; {layer} has {layer}H0 to {layer}H{n_heads - 1}")
    if not head and receiver is None:
        raise ValueError(f"name the receiver for all heads of {sender}; one head is shown at all receivers")
    start = contributions.senders.slice_of(layer).start

    columns = (
        range(len(contributions.receivers)) if receiver is None else [contributions.receiver_index(receiver)]
    )

    def cells_of(values: np.ndarray) -> np.ndarray:
        run = values[start : start + n_heads * n_sources].reshape(n_heads, n_sources, -1)
        return run[int(head)].T[columns] if head else run[:, :, columns[0]]

    # Where a query cannot see a source it would count as 0; the blank of a source after the query is no 0.
    values, errors = table(contributions, measure, position, when_active=True)
    if np.isnan(cells_of(values)).all():
        raise ValueError(f"no router of these reads {sender}: name a receiver that comes after it")
    shared = partner_of(measure)
    routers = [contributions.receivers[column] for column in columns]
    if head:
        rows, what, row_title, place = routers, f"{sender} → router of %{{y}}", "receiving router", ""
    else:
        rows, row_title, place = [f"H{i}" for i in range(n_heads)], "head", f" at the router of {routers[0]}"
        what = f"{layer}%{{y}} → router of {routers[0]}"
    by_offset = label == SOURCE_AXES["offset"]
    figure = measure_heatmap(
        measure,
        cells_of(values),
        cells_of(errors),
        rows=rows,
        columns=[str(i) for i in range(n_sources)],
        what=what + (", %{x} tokens back" if by_offset else ", from position %{x}"),
        partner=None if shared is None else cells_of(table(contributions, shared, position, True)[0]),
    )
    column_title = "source, tokens back from the query" if by_offset else "source, position in the document"
    title = f"{MEASURE_NAMES[measure]}: {sender}{place}, by source token"
    subtitle = f"{of_tokens(position)} that can see the source"
    lay_out(figure, title, column_title, row_title, n_rows=len(rows), subtitle=subtitle)
    return figure
