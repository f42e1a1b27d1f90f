"""The tables of an audit's page: verification, a grid of effects, all rows, progressive removal, redistribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import moe_lens.audit.protocol as protocol
from moe_lens.audit.audit_tables import AuditTables
from moe_lens.audit_page.beyond import beyond_d
from moe_lens.audit_page.experiments import VERDICTS, Experiment, verdict_counts
from moe_lens.audit_page.numbers import LOW, MISSING, Row, at_most, rows_of, rows_table

_FOUND = ("valid", "inverted", "disagreement")
_MOST_FOUND = 24
_MOST_OPEN = 400
_COLUMN_NAMES = {"p_t_holm": "p, t (Holm)", "p_wilcoxon_holm": "p, ranks (Holm)"}
_INTERVAL = ("interval of d", "d_low", "d_high")
_DEFAULT = ("d", _INTERVAL, "p_t_holm", "p_wilcoxon_holm", "verdict")
_SIGNS = {"<=": "≤", ">": ">", "==": "="}

MEANINGS = {
    "valid": "removing the highest expert costs more than removing the lowest, by both tests",
    "inverted": "the reverse, by both tests",
    "disagreement": "one of the tests finds something, or they find opposite signs; often differences that are skewed, "
    "which the rank test finds even if their mean is zero",
    "equivalent": "|d| is shown to be below the smallest effect (two one-sided tests at 5%, uncorrected); it may still "
    "differ from zero, and may still help pruning: see pruning gain",
    "inconclusive": "neither an effect nor its absence is shown; also under 10 pairs or 5 documents, or where there "
    "are too few documents for the rank test ever to find one",
}


# ---- verification ----


def verification_table(tables: AuditTables) -> str:
    """Every check of every model: a line for each check, a column for each model."""
    rows = rows_of("verification", tables.verification)
    checks: dict[str, dict[str, Row]] = {}
    for row in rows:
        checks.setdefault(row["check"], {})[row["label"]] = row
    several = len(tables.labels) > 1
    head = "<th>check</th>" + "".join(
        f"<th>{escape(label) if several else 'measured'}</th>" for label in tables.labels
    )
    lines = []
    for name, by_label in checks.items():
        cells = "".join(_check(by_label.get(label)) for label in tables.labels)
        meaning = next(iter(by_label.values())).html("meaning")
        lines.append(f"<tr><td>{escape(name)}</td>{cells}<td>{meaning}</td></tr>")
    return (
        f'<div class="wide"><table class="verification"><thead><tr>{head}<th>what it means</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _check(row: Row | None) -> str:
    if row is None:
        return f'<td title="not run, as an earlier check failed">{MISSING}</td>'
    rule = str(row["rule"])
    tag, css, said = ("span", "good", "") if row["passed"] else ("b", "bad", "failed: ")
    return (
        f'<td class="check"><{tag} class="{css}">{said}{row.html("value")} {escape(row["unit"])}</{tag}>'
        f'<span class="bound">{escape(_SIGNS.get(rule, rule))} {row.html("tolerance")}</span></td>'
    )


# ---- an experiment ----


def legend() -> str:
    """What the colours and marks of the grids say."""
    items = "".join(
        f'<li><span class="chip {name}">{name}</span> {escape(MEANINGS[name])}</li>' for name in VERDICTS
    )
    return f'<ul class="legend">{items}</ul>'


def experiment_tables(experiment: Experiment, *, rows_open: bool = False) -> str:
    """A grid of d, the cells where something was found, what was computed beyond d, and all rows by layer.

    Args:
        rows_open: whether the rows are seen at once, unless there are over 400, and not only on request.
    """
    columns = list(experiment.rows[0].values)
    is_open = rows_open and len(experiment.rows) <= _MOST_OPEN
    return (
        f"{_grid(experiment)}{_corrected_within(experiment)}{_found(experiment)}"
        f"{beyond_d(experiment)}{_all_rows(experiment, columns, is_open)}"
    )


def _corrected_within(experiment: Experiment) -> str:
    """Of what the intervals and p are, and how many tests each p was corrected for. All metrics are one family; so is
    each control."""
    sizes: dict[tuple[str, int], tuple[Row, set[str]]] = {}
    for row in experiment.rows:
        _, names = sizes.setdefault((row["family"], int(row["n_family"])), (row, set()))
        names.add(row["metric"])
    parts = []
    for (family, n), (row, names) in sizes.items():
        cells = f"{row.html('n_family')} cell{'' if n == 1 else 's'}"
        controls = "each control" if len(names) > 1 else "the control"
        parts.append(f"{cells} of {'the metrics' if family == 'metrics' else controls}")
    said = (
        f"Intervals: {100 * (1 - experiment.alpha):g}%, each cell alone. p: after Holm. Corrected within "
        f"{', and within '.join(parts)}. Another set of metrics is another family, and so are its verdicts."
    )
    if any(row.direction for row in experiment.rows):
        said += f" (low): {LOW}."
    if experiment.of(family="metrics", verdict="equivalent"):
        found = {"family": "metrics", "verdict": "equivalent"}
        said += (
            f" The test of equivalence is not corrected; after Holm too (<code>p_tost_holm</code>) "
            f"{experiment.count(**found, p_tost_holm=at_most(experiment.alpha))} of the {experiment.count(**found)} "
            f"equivalent cells of metrics would be."
        )
    return f'<p class="note">{said}</p>'


def _grid(experiment: Experiment) -> str:
    layers = experiment.layers
    by_place = {(row["family"], row["metric"], int(row["layer"])): row for row in experiment.rows}
    head = "".join(f'<th class="number">M{layer}</th>' for layer in layers)
    lines, before = [], ""
    for family, metric in experiment.metrics:
        cells = "".join(_of_grid(by_place.get((family, metric, layer))) for layer in layers)
        apart = ' class="apart"' if family != before else ""
        before = family
        lines.append(f"<tr{apart}>{_name_of(experiment, family, metric)}{cells}</tr>")
    return (
        f'<div class="wide"><table class="grid"><thead><tr><th>d by layer</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _name_of(experiment: Experiment, family: str, metric: str) -> str:
    control = ' <span class="kind">control</span>' if family == "control" else ""
    direction = experiment.of(family=family, metric=metric)[0].direction
    return f'<th scope="row">{escape(metric)}{direction}{control}</th>'


def _of_grid(row: Row | None) -> str:
    if row is None:
        return '<td title="not audited"></td>'
    return row.cell(
        "d", css=f"verdict {row['verdict']}", link=row.anchor, title=f"{row['verdict']}; row {row.number}"
    )


def _found(experiment: Experiment) -> str:
    rows = [row for row in experiment.of(family="metrics") if row["verdict"] in _FOUND]
    differ = experiment.of(family="metrics", verdict="equivalent", **experiment.by_both_tests)
    return _found_rows("Metrics that are valid, inverted, or where the tests disagree", rows) + _found_rows(
        "Metrics that are equivalent, though both tests are significant", differ
    )


def _found_rows(title: str, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    drawn = rows_table(rows, ("metric", "layer", *_DEFAULT), names=_COLUMN_NAMES)
    if len(rows) <= _MOST_FOUND:
        return f"<h4>{title}</h4>{drawn}"
    return f"<details><summary>{title}</summary>{drawn}</details>"


def _all_rows(experiment: Experiment, columns: Sequence[str], is_open: bool) -> str:
    shown = {"metric", "d", *_INTERVAL[1:], *_DEFAULT[2:]}
    more = [name for name in columns if name not in shown]
    parts = []
    for layer in experiment.layers:
        rows = experiment.of(layer=layer)
        metrics = experiment.of(layer=layer, family="metrics")
        parts_said = [
            f"{experiment.count(layer=layer, family='metrics', verdict=name)} {name}"
            for name in verdict_counts(metrics)
        ]
        said = [f"metrics: {', '.join(parts_said)}"] if metrics else []
        controls = [
            f"{row['metric']} {row['verdict']}" for row in experiment.of(layer=layer, family="control")
        ]
        said += [f"controls: {escape(', '.join(controls))}"] if controls else []
        counts = "; ".join(said)
        parts.append(
            f'<h4>Layer {layer} <span class="kind">{counts}</span></h4>'
            + rows_table(rows, ("metric", *_DEFAULT), more, names=_COLUMN_NAMES, anchors=True)
        )
    return f"""<details class="all"{" open" if is_open else ""}><summary>All rows, by layer</summary>
<label><input type="checkbox"> all {len(columns)} columns</label>
{"".join(parts)}</details>"""


def columns_explained() -> str:
    """What the columns of the table `audit` are, on request."""
    text = (protocol.__doc__ or "").strip()
    return f"<details><summary>What the columns are</summary><pre>{escape(text)}</pre></details>"


# ---- progressive removal ----

_OF_PROGRESSIVE = (
    "layer", "removed", "n_rows", "n_documents", "delta_loss", "delta_loss_standard_error", "delta_loss_median",
    "delta_loss_p95",
)  # fmt: skip
_PROGRESSIVE_NAMES = {
    "removed": "k",
    "n_rows": "positions",
    "n_documents": "documents",
    "delta_loss": "mean, nats",
    "delta_loss_standard_error": "standard error",
    "delta_loss_median": "median",
    "delta_loss_p95": "95th percentile",
}


def progressive_table(rows: Sequence[Row]) -> str:
    """Of one model: the lines of the largest k; all of them on request."""
    most = max(row["removed"] for row in rows)
    largest = [row for row in rows if row["removed"] == most]
    everything = list(rows[0].values)
    more = [name for name in everything if name not in _OF_PROGRESSIVE]
    if len(largest) == len(rows):
        return rows_table(rows, (*_OF_PROGRESSIVE, *more), names=_PROGRESSIVE_NAMES, anchors=True)
    first = rows_table(largest, _OF_PROGRESSIVE, names=_PROGRESSIVE_NAMES)
    every = rows_table(rows, (*_OF_PROGRESSIVE, *more), names=_PROGRESSIVE_NAMES, anchors=True)
    return f"{first}<details><summary>Every k, all columns</summary>{every}</details>"


# ---- redistribution ----

_CHAINS = (
    ("routing_weight", "gap_norm", ""),
    ("gap_norm", "relative_compensation", ""),
    ("routing_weight", "relative_compensation", ""),
    ("routing_weight", "relative_compensation", "gap_norm"),
    ("gap_norm", "delta_loss", ""),
    ("routing_weight", "delta_loss", ""),
)
_OF_REDISTRIBUTION = (
    "layer", "x", "y", "given", "rho", ("interval, documents", "low", "high"),
    ("interval, experts", "low_experts", "high_experts"), "p", "n_experts",
)  # fmt: skip


def redistribution_table(rows: Sequence[Row]) -> str:
    """Of one model: rho with interval and p, a line for each layer and a column for each pair; all rows on request."""
    by_layer: dict[int, dict[tuple[str, str, str], Row]] = {}
    for row in rows:
        by_layer.setdefault(int(row["layer"]), {})[(row["x"], row["y"], row["given"])] = row
    there = {pair for found in by_layer.values() for pair in found}
    pairs = [pair for pair in _CHAINS if pair in there] + sorted(there - set(_CHAINS))
    head = "".join(f"<th>{_pair_name(pair)}</th>" for pair in pairs)
    lines = []
    for layer, found in sorted(by_layer.items()):
        gap = next(iter(found.values())).cell("mean_gap_norm")
        cells = "".join(_correlation(found.get(pair)) for pair in pairs)
        lines.append(f'<tr><th scope="row">M{layer}</th>{gap}{cells}</tr>')
    shown = {
        name
        for column in _OF_REDISTRIBUTION
        for name in ((column,) if isinstance(column, str) else column[1:])
    }
    more = [name for name in rows[0].values if name not in shown]
    every = rows_table(rows, (*_OF_REDISTRIBUTION, *more), anchors=True)
    return f"""<div class="wide"><table class="chains"><thead><tr><th>layer</th><th class="number">mean gap norm</th>
{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>
<details><summary>All rows, all columns</summary>{every}</details>"""


def _pair_name(pair: tuple[str, str, str]) -> str:
    x, y, given = (escape(name.replace("_", " ")) for name in pair)
    return f"{x}, {y}" + (f", given {given}" if given else "")


def _correlation(row: Row | None) -> str:
    if row is None:
        return f'<td title="not computed">{MISSING}</td>'
    interval = f'<span class="interval">{row.interval("low", "high")}</span>'
    p = f'<span class="interval">p&nbsp;{row.html("p")}</span>'
    return f'<td class="number">{row.html("rho", link=row.anchor)} {interval} {p}</td>'


def by_label(rows: Sequence[Row]) -> Mapping[str, list[Row]]:
    """Rows of each model, in the order of the table."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["label"], []).append(row)
    return found
