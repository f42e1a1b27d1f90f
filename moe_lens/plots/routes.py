"""Route experiments: the maps of all conditions side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moe_lens.interventions.route_experiment import UNCHANGED, RouteExperiment
from moe_lens.plots.stripes import stripes
from moe_lens.plots.style import MUTED, Scale, check_scale, colorbar, diverging, lay_out, layout_of, literal
from moe_lens.plots.values import MEASURE_NAMES, colours, of_tokens, partner_of, unit

_MOST_ACROSS = 4
_GAP = 0.03


def route_maps(
    experiment: RouteExperiment,
    measure: str = "variance",
    position: str = "rest",
    *,
    senders: str | Sequence[str] | None = "mlp",
    scale: Scale = "linear",
    difference: bool = False,
) -> go.Figure:
    """The stripes of every condition beside the unchanged ones, in the same colours; above each the change of the loss.

    Args:
        experiment: from `top_k_sensitivity`, `rank_swaps` or `silence`.
        measure, position, senders, scale: as for `stripes`.
        difference: instead of every changed map, it minus the unchanged one, about zero.

    Raises:
        ValueError: no such measure, position or sender; a log scale of a signed measure, or of differences; over 400
            senders.

    Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), figures 20, 25
    and 26.
    """
    check_scale(scale)
    if difference and scale == "log":
        raise ValueError("differences have no log scale: a measure may rise or fall")
    drawn = {
        name: stripes(condition.contributions, measure, position, senders=senders, scale=scale)
        for name, condition in experiment.conditions.items()
    }
    cells = {name: np.asarray(_traces(figure)[0].customdata)[..., 0] for name, figure in drawn.items()}
    shared = colours(
        measure, np.stack(list(cells.values())), _partners(experiment, measure, position, senders), scale
    )
    changes = {name: cells[name] - cells[UNCHANGED] for name in cells if name != UNCHANGED}
    names = list(changes) if difference else list(cells)
    if difference:
        shared = diverging(*changes.values()) | dict(colorbar=colorbar(f"change, {unit(measure)}"))
    across = min(len(names), _MOST_ACROSS)
    figure = make_subplots(rows=-(-len(names) // across), cols=across)
    for i, name in enumerate(names):
        row, column = divmod(i, across)
        for number, trace in enumerate(_traces(drawn[name])):
            if difference:
                trace.z = changes[name]
                trace.hovertemplate = (
                    trace.hovertemplate.split("<br>")[0] + "<br>change %{z:.4g}<extra></extra>"
                )
            if number == 0:
                trace.update(shared | dict(showscale=i == len(names) - 1))
            figure.add_trace(trace, row=row + 1, col=column + 1)
    what = f"Change of the {MEASURE_NAMES[measure].lower()}" if difference else MEASURE_NAMES[measure]
    n_documents = int((experiment.n_losses > 0).sum())
    subtitle = f"{n_documents:,} document{'s' if n_documents != 1 else ''}; Δ: change of the mean loss over documents"
    lay_out(figure, f"{what}, {of_tokens(position)}", "", "", subtitle=subtitle)
    _place(figure, experiment, names, across)
    return figure


def _traces(figure: go.Figure) -> list[Any]:
    return list(figure.data)  # type: ignore[arg-type]


def _partners(
    experiment: RouteExperiment, measure: str, position: str, senders: str | Sequence[str] | None
) -> np.ndarray | None:
    """The same cells of the measure that shares the colours."""
    partner = partner_of(measure)
    if partner is None:
        return None
    figures = [
        stripes(c.contributions, partner, position, senders=senders) for c in experiment.conditions.values()
    ]
    return np.stack([np.asarray(_traces(figure)[0].customdata)[..., 0] for figure in figures])


def _place(figure: go.Figure, experiment: RouteExperiment, names: Sequence[str], across: int) -> None:
    """Panels of one size, and what each is of above it."""
    layout = layout_of(figure)
    n_rows = -(-len(names) // across)
    n_receivers = len(experiment.unchanged.contributions.receivers)
    panel_height = max(120, min(24 * n_receivers, 700))
    height = 130 + n_rows * (panel_height + 66)
    losses = experiment.to_frame().set_index("condition")
    wide, tall = (1 - (across - 1) * _GAP) / across, panel_height / (height - 130)
    pitch = 1 / n_rows if n_rows > 1 else 0.0
    for i, name in enumerate(names):
        row, column = divmod(i, across)
        number = "" if i == 0 else i + 1
        left, top = column * (wide + _GAP), 1 - row * pitch
        bottom = max(top - (tall if n_rows > 1 else 1), 0.0)
        layout[f"xaxis{number}"].update(
            domain=[left, left + wide], title_text="sender" if row == n_rows - 1 else "", type="category"
        )
        layout[f"yaxis{number}"].update(
            domain=[bottom, top],
            title_text="receiving router" if column == 0 else "",
            type="category",
            autorange="reversed",
            showticklabels=column == 0,
        )
        text = literal(name)
        if name != UNCHANGED:
            change = f"{losses['delta_loss'][name]:+.2g}".replace("-", "−")
            text += f" (Δ {change} nats)"
        figure.add_annotation(
            text=text,
            x=left,
            y=top + 0.01,
            xref="paper",
            yref="paper",
            xanchor="left",
            yanchor="bottom",
            showarrow=False,
            font=dict(size=12, color=MUTED),
        )
    figure.update_layout(height=height, margin_t=92, title_y=1 - 16 / height)
