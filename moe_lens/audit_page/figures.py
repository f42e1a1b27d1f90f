"""The figures of an audit's page, as HTML. Their hovering says the row of each point, as the tables do."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import pandas as pd

from moe_lens.audit.audit_tables import AuditTables
from moe_lens.audit.published import published_cells
from moe_lens.audit.published_beside import published_key
from moe_lens.audit_page.experiments import POSITIVE_CONTROL, Experiment
from moe_lens.page import figure_html
from moe_lens.plots import control_lines, effect_forest, progressive_lines, redistribution_chains, scope_pairs

_SIDE_BY_SIDE = 3
"""Models in a forest plot."""
_WEIGHT = "routing_weight"
_ORDER = ["family", "metric", "layer"]


def audit_figures(tables: AuditTables, experiments: Sequence[Experiment]) -> str:
    """Forest plots, the controls by depth, and the two scopes against each other."""
    parts = ["<h3>Every effect with its interval</h3>"]
    kinds = dict.fromkeys(_alike(one) for one in experiments)
    for kind in kinds:
        alike = [one for one in experiments if _alike(one) == kind]
        if len(kinds) > 1:
            parts.append(f"<h4>{escape(alike[0].kind)}</h4>")
        effect = alike[0].settings.get("smallest_effect")
        for start in range(0, len(alike), _SIDE_BY_SIDE):
            cells = _together(alike[start : start + _SIDE_BY_SIDE], by_model=True)
            parts.append(
                f'<div class="figures">{figure_html(effect_forest(cells, smallest_effect=effect))}</div>'
            )
    parts += [_controls(tables, experiments), _scopes(experiments)]
    return "\n".join(filter(None, parts))


def _alike(experiment: Experiment) -> tuple[str, object]:
    """What is shown in one forest plot: another model's experiment of the same kind."""
    return experiment.kind, experiment.settings.get("smallest_effect")


def _together(experiments: Sequence[Experiment], *, by_model: bool) -> pd.DataFrame:
    """Their rows, with their numbers as index; named by the model alone where all else is the same."""
    return pd.concat([one.frame.assign(label=one.label if by_model else one.name) for one in experiments])


def _controls(tables: AuditTables, experiments: Sequence[Experiment]) -> str:
    # Released definitions of metrics make no difference to a control.
    own = [one for one in experiments if not one.as_released] or list(experiments)
    by_model = len({one.kind for one in own}) == 1
    drawn = []
    for control in (_WEIGHT, POSITIVE_CONTROL):
        having = [one for one in own if one.of(family="control", metric=control)]
        if having:
            published = _published(tables, having, by_model) if control == _WEIGHT else None
            figure = control_lines(_together(having, by_model=by_model), control=control, published=published)
            drawn.append(figure_html(figure))
    if not drawn:
        return ""
    pair = " pair" if len(drawn) == 2 else ""
    return f"""<h3>The controls, by depth</h3>
<p>A quantity of the token itself, in the metric’s place: the routing weight that the router gave, and, as positive
control, the first-order estimate of what the ablation does. Behind them is the range of all metrics.</p>
<div class="figures{pair}">{"".join(drawn)}</div>"""


def _published(tables: AuditTables, experiments: Sequence[Experiment], by_model: bool) -> pd.DataFrame | None:
    """The published control of the models that have one, in the colour of their first experiment."""
    models = {one["label"]: published_key(one["model"], one["model_type"]) for one in tables.provenance}
    parts = []
    for label in dict.fromkeys(one.label for one in experiments):
        key = models.get(label)
        if key is not None:
            name = label if by_model else next(one.name for one in experiments if one.label == label)
            cells = published_cells(key)
            parts.append(cells.loc[cells["family"] == "control"].assign(label=name))
    return pd.concat(parts, ignore_index=True) if parts else None


def _scopes(experiments: Sequence[Experiment]) -> str:
    """For each model that has both."""
    drawn = []
    for token in experiments:
        if (token.scope, token.number) != ("token", 1):
            continue
        for sequence in experiments:
            same = (sequence.label, sequence.how, sequence.as_released, sequence.number) == (
                token.label,
                token.how,
                token.as_released,
                1,
            )
            if same and sequence.scope == "sequence":
                drawn.append(_pair(token, sequence))
    if not drawn:
        return ""
    return f"""<h3>The two scopes</h3>
<p>The same cells, with each expert changed at one token and wherever it is active in the document: different
experiments. On the dashed line they give the same.</p>
{"".join(drawn)}"""


def _pair(token: Experiment, sequence: Experiment) -> str:
    name = escape(token.label) + (f", {escape(token.as_released)}" if token.as_released else "")
    cells = [set(one.frame[_ORDER].itertuples(index=False, name=None)) for one in (token, sequence)]
    if cells[0] != cells[1]:
        return (
            f"<p>The two scopes of {name} are of other metrics or layers, so there is no figure of them.</p>"
        )
    # The rows of one model: as a panel's name, the label would say nothing.
    figure = scope_pairs(token.frame, sequence.frame)
    return f'<h4>{name}</h4><div class="figures">{figure_html(figure)}</div>'


def progressive_figure(tables: AuditTables, label: str) -> str:
    """Of one model."""
    frame = tables.progressive
    return f'<div class="figures">{figure_html(progressive_lines(frame.loc[frame["label"] == label]))}</div>'


def redistribution_figure(tables: AuditTables) -> str:
    """Of all models that have it."""
    return f'<div class="figures">{figure_html(redistribution_chains(tables.redistribution))}</div>'
