"""What an experiment has beyond d: rank correlation, pruning gain and posterior odds, as tables of metric by layer."""

from __future__ import annotations

from html import escape

from moe_lens.audit_page.experiments import Experiment
from moe_lens.audit_page.numbers import Row

_TABLES = (
    (
        "pruning_gain",
        "pruning_gain_standard_error",
        "Pruning gain, nats",
        "the mean loss of removing a random active expert less that of removing the one that the metric claims least "
        "for, with its standard error: above 0 the metric saves loss, which it may do where d is small",
    ),
    (
        "log_odds",
        "",
        "Posterior odds, natural log",
        "the log Bayes factor of the metric’s ranks against a model in which no metric says anything: above 0 they say "
        "something of the loss change",
    ),
    (
        "spearman",
        "spearman_standard_error",
        "Rank correlation",
        "Spearman’s, of claimed importance and loss change over all active experts of a position, mean over positions, "
        "with its standard error",
    ),
)


def beyond_d(experiment: Experiment) -> str:
    """All three on request, as HTML; every number is of the row of the same metric and layer."""
    by_place = {(row["family"], row["metric"], int(row["layer"])): row for row in experiment.rows}
    head = "".join(f'<th class="number">M{layer}</th>' for layer in experiment.layers)
    parts = []
    for column, error, title, meaning in _TABLES:
        lines = []
        for family, metric in experiment.metrics:
            of_metric = [by_place.get((family, metric, layer)) for layer in experiment.layers]
            direction = next(row.direction for row in of_metric if row is not None)
            control = ' <span class="kind">control</span>' if family == "control" else ""
            cells = "".join(_cell(row, column, error) for row in of_metric)
            lines.append(f'<tr><th scope="row">{escape(metric)}{direction}{control}</th>{cells}</tr>')
        parts.append(
            f'<h4>{title}</h4><p class="note">{meaning[0].upper()}{meaning[1:]}.</p>'
            f'<div class="wide"><table class="beyond"><thead><tr><th>{column}</th>{head}</tr></thead>'
            f"<tbody>{''.join(lines)}</tbody></table></div>"
        )
    return f"<details><summary>Pruning gain, posterior odds, rank correlation</summary>{''.join(parts)}</details>"


def _cell(row: Row | None, column: str, error: str) -> str:
    if row is None:
        return '<td title="not audited"></td>'
    of = f' <span class="kind">±{row.html(error)}</span>' if error else ""
    return f'<td class="number">{row.html(column, link=row.anchor)}{of}</td>'
