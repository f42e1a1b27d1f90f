"""The causal audit of one or more models as a page, and as a part of a page.

    tables = AuditTables.of([audit_model(model, "mini", corpus)])
    write_audit_page(tables, "audit.html")

Verification stands on top, and a model that fails it has no result here. By default the page shows d, its interval,
p-values after Holm's correction, and verdicts; all else opens on request. Every number of a result says of which row of
which saved table it is (see `moe_lens.audit_page.numbers`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from moe_lens.audit.audit_tables import AuditTables
from moe_lens.audit_page.answers import answer
from moe_lens.audit_page.experiments import POSITIVE_CONTROL, Experiment, experiments_of, what_was_done
from moe_lens.audit_page.figures import audit_figures, progressive_figure, redistribution_figure
from moe_lens.audit_page.noise import noise_html
from moe_lens.audit_page.numbers import count_html, rows_of
from moe_lens.audit_page.provenance import provenance_section
from moe_lens.audit_page.published import published_section
from moe_lens.audit_page.tables import (
    by_label,
    columns_explained,
    experiment_tables,
    legend,
    progressive_table,
    redistribution_table,
    verification_table,
)
from moe_lens.page import page_html, write_page

__all__ = ["AUDIT_CSS", "audit_page_html", "audit_section", "write_audit_page"]

AUDIT_CSS = """
h4 { font-size: 14px; margin: 22px 0 4px; }
h4 .kind, .kind { color: var(--muted); font-weight: 400; font-size: 12.5px; }
ul.done { padding-left: 1.2em; max-width: 60em; } ul.done li { margin: 4px 0; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 22px; padding: 0; margin: 8px 0 4px;
  font-size: 13px; color: var(--muted); }
.valid { --mark: "▶"; --tint: #d3e6f5; --on: #0a4f80; }
.inverted { --mark: "◀"; --tint: #fbdcc8; --on: #8f3c00; }
.disagreement { --mark: "✕"; --tint: #e4dbf0; --on: #4a2d78; }
.equivalent { --mark: "●"; --tint: #f0f3f6; --on: #4d5a67; }
.inconclusive { --mark: "○"; --tint: transparent; --on: #8a5d00; }
.chip { background: var(--tint); color: var(--on); border-radius: 4px; padding: 1px 7px; }
.chip::before { content: var(--mark) " "; font-size: 9px; }
.card b span { font-size: inherit; color: inherit; }
.figures + .wide { margin-top: 12px; }
p [data-row] { white-space: nowrap; }
table.grid { font-size: 11.5px; width: auto; min-width: 60%; }
table.grid th, table.grid td { padding: 3px 2px; }
table.grid thead th { position: sticky; top: 0; background: white; }
table.grid tbody th { font-weight: 400; color: var(--ink); position: sticky; left: 0; background: white;
  white-space: nowrap; font-size: 12px; }
table.grid tr.apart:not(:first-child) > * { border-top: 2px solid var(--muted); }
table.grid td.verdict { background: var(--tint); border: 1px solid white; }
table.grid td.verdict a { color: var(--on); text-decoration: none; }
table.grid td.verdict::after { content: var(--mark); color: var(--on); font-size: 8px; display: inline-block;
  width: 10px; text-align: right; vertical-align: 1px; }
table.beyond { font-size: 12px; width: auto; min-width: 60%; }
table.beyond th, table.beyond td { padding: 3px 6px; white-space: nowrap; }
table.beyond tbody th { font-weight: 400; color: var(--ink); position: sticky; left: 0; background: white; }
table.beyond .kind { font-size: 10.5px; }
table.rows { font-size: 13px; width: auto; min-width: 60%; }
table.rows th, table.rows td { padding: 4px 12px; white-space: nowrap; }
table.rows th.row { color: var(--muted); font-weight: 400; font-size: 12px; }
table.rows td.verdict { color: var(--on); }
table.rows td.verdict::before { content: var(--mark) " "; font-size: 9px; }
table.rows td:nth-child(2) { position: sticky; left: 0; background: white; }
table.rows tr:target > * { background: #fff4cf; }
.interval { font-variant-numeric: tabular-nums; white-space: nowrap; }
.chains .interval { color: var(--muted); font-size: 11.5px; display: block; }
.more { display: none; }
details.all:has(> label input:checked) .more { display: table-cell; }
details.all > label { font-size: 13px; color: var(--muted); }
td a, p a { color: inherit; text-decoration-color: #b8c2cc; text-underline-offset: 3px; }
td.check { white-space: nowrap; font-size: 13px; }
td.check .bound { display: block; color: var(--muted); }
td.check .good::before { content: "✓ "; } td.check .bad::before { content: "✕ "; }
table.beside, table.contradictions, table.chains, .sides table { font-size: 13px; }
table.beside th, table.beside td, table.chains th, table.chains td { padding: 4px 10px; }
table.beside, table.chains { width: auto; min-width: 60%; }
table.chains th, table.chains td { padding: 4px 6px; }
table.beside .group { border-left: 2px solid var(--line); }
table.beside thead th.number, table.contradictions thead th.number {
  white-space: normal; max-width: 9em; vertical-align: bottom; }
table.beside thead th.group[colspan] { text-align: center; max-width: none; }
table.beside tbody th, table.chains tbody th, table.contradictions tbody th {
  font-weight: 400; color: var(--ink); white-space: nowrap; }
.sides td { min-width: 12em; }
pre { font-size: 12px; background: white; border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px;
  overflow-x: auto; }
code { font-size: 0.92em; }
"""
"""The look of `audit_section`, beyond what all pages share."""

_FILES = (
    "Every number here is of a row of a saved table, and a full row begins with its number, from 0: <code>#17</code> "
    "of the audit is row 17 of <code>audit.parquet</code>. The others are <code>verification.parquet</code>, "
    "<code>progressive.parquet</code>, <code>redistribution.parquet</code> and <code>published.parquet</code>. In the "
    "page’s source each number has its row and column as <code>data-row</code> and <code>data-column</code>; a count "
    "has what it counts as <code>data-where</code>."
)


def write_audit_page(tables: AuditTables, path: str | Path) -> Path:
    """Write the page. It needs no other file.

    Args:
        tables: of one or more models; `tables.save(folder)` writes the rows that the page refers to.
        path: of the page.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    return write_page(audit_page_html(tables), path)


def audit_page_html(tables: AuditTables) -> str:
    """The page as text; see `write_audit_page`."""
    experiments = experiments_of(tables)
    of = tables.labels[0] if len(tables.labels) == 1 else ""
    title = f"Does any metric say which experts{f' of {of}' if of else ''} matter?"
    parts = [f"<h1>{escape(title)}</h1>"]
    if experiments:
        parts += [_lead(experiments), _cards(tables, experiments)]
    parts.append(_verification(tables))
    if experiments:
        parts += [
            "<h2>The audit</h2>",
            audit_section(tables, rows_open=True),
            published_section(tables, experiments),
            provenance_section(tables),
        ]
    return page_html(title, "\n".join(parts), css=AUDIT_CSS, figures=bool(experiments))


def audit_section(tables: AuditTables, *, rows_open: bool = False, lead: bool = False) -> str:
    """What the audit found, as HTML; the page must have plotly's script and `AUDIT_CSS`, and a heading above it.

    Args:
        tables: models that failed verification have no rows but those of their checks. Where all did, this says so.
        rows_open: whether all rows are seen at once, of experiments with at most 400, and not only on request.
        lead: whether it begins with what was done, for a page that does not say so above.
    """
    experiments = experiments_of(tables)
    if not experiments:
        return '<p class="bad">No model passed verification, so there is no result.</p>'
    answers = [f"{answer(one)}{noise_html(one)}" for one in experiments]
    parts = [_lead(experiments)] if lead else []
    parts += [*answers, f'<p class="note">{_FILES}</p>']
    parts.append(audit_figures(tables, experiments))
    parts += [
        "<h3>Every metric at every layer</h3>",
        "<p>Cohen’s d of the paired difference: what ablating a token’s highest expert by the metric costs, less what "
        "ablating its lowest costs. A verdict takes the t-test and the signed-rank test, both with documents as "
        "clusters and corrected after Holm, and a test of equivalence, which is not corrected: of cells whose |d| is "
        "at the bound, up to 5% are called equivalent all the same. A number leads to its row.</p>",
        legend(),
    ]
    for one in experiments:
        parts.append(f"<h3>{escape(one.name)}</h3>{experiment_tables(one, rows_open=rows_open)}")
    parts += [columns_explained(), _progressive(tables), _redistribution(tables)]
    return "\n".join(filter(None, parts))


# ---- the top ----


def _lead(experiments: Sequence[Experiment]) -> str:
    done = "".join(f"<li>{what_was_done(one)}</li>" for one in experiments)
    effects = " or ".join(
        f"{effect:g}" for effect in dict.fromkeys(one.smallest_effect for one in experiments)
    )
    return f"""<p class="lead">At each position the experts at work are ranked by a metric, and what ablating the
highest does to the loss is compared with what ablating the lowest does. A metric is called valid at a layer if both
tests find the difference positive after correction, and |d| is not shown to be below {effects}.</p>
<ul class="done lead">{done}</ul>"""


def _cards(tables: AuditTables, experiments: Sequence[Experiment]) -> str:
    """Counts are of the first experiment's kind alone: others have the same controls, and metrics of other
    definitions or of another scope."""
    rows = rows_of("audit", tables.audit)
    n_passed = sum(one["passed"] for one in tables.provenance)
    first = next((one for one in experiments if not one.as_released), experiments[0])
    kind = {"scope": first.scope, "how": first.how, "as_released": first.as_released}
    metrics = {**kind, "family": "metrics"}
    control = {**kind, "family": "control", "metric": POSITIVE_CONTROL}
    alike = [one for one in experiments if (one.scope, one.how, one.as_released) == tuple(kind.values())]
    of = f"{first.scope} scope" + ("" if first.how == "zero" else f", {first.how}")
    of += f", metrics as released for {first.as_released}" if first.as_released else ", own definitions"
    of += f", {len(alike)} experiments" if len(alike) > 1 else ""

    def count(where: Mapping[str, Any]) -> str:
        return count_html("audit", rows, where)

    verified = f"{n_passed} of {len(tables.labels)}"
    cards = [(verified, "models passed verification", "good" if tables.passed else "bad")]
    if any(one.of(family="metrics") for one in alike):
        differ = count({**metrics, "verdict": "equivalent", **first.by_both_tests})
        cards += [
            (
                f"{count({**metrics, 'verdict': 'valid'})} of {count(metrics)}",
                f"cells of metrics are valid ({escape(of)})",
                "",
            ),
            (
                count({**metrics, "verdict": "equivalent"}),
                f"of these have |d| shown to be below {first.smallest_effect:g}; {differ} of "
                f"them still differ from zero by both tests",
                "",
            ),
            (count({**metrics, "verdict": "inconclusive"}), "of these are inconclusive", ""),
        ]
    seen = [
        row["verdict"] == "valid"
        for one in alike
        for row in one.of(family="control", metric=POSITIVE_CONTROL)
    ]
    if seen:
        cards.append(
            (
                f"{count({**control, 'verdict': 'valid'})} of {count(control)}",
                f"cells of the positive control are valid ({escape(of)})",
                "good" if all(seen) else "bad" if not any(seen) else "",
            )
        )
    boxes = [
        f'<div class="card"><b class="{kind}">{value}</b><span>{text}</span></div>'
        for value, text, kind in cards
    ]
    return f'<div class="cards">{"".join(boxes)}</div>'


def _verification(tables: AuditTables) -> str:
    failed = [one["label"] for one in tables.provenance if not one["passed"]]
    said = [
        f'<p><b class="bad">{escape(label)} failed verification: it is not the model that transformers runs, or an '
        f"intervention does not do what it says. No result of it is shown.</b></p>"
        for label in failed
    ]
    on = "; ".join(
        f"{escape(one['label'])} in {escape(str(one['verified']['dtype']))} on {one['verified']['n_tokens']:,} tokens "
        f"of {one['verified']['n_documents']:,} documents"
        for one in tables.provenance
    )
    return f"""<h2>Is this the model?</h2>
<p>The same tokens through transformers’ model and through the hooked one, and interventions that must do what they
say: {on}.</p>
{"".join(said)}
{verification_table(tables)}"""


# ---- beyond one expert at a time ----


def _progressive(tables: AuditTables) -> str:
    if tables.progressive.empty:
        return ""
    rows = by_label(rows_of("progressive", tables.progressive))
    parts = [
        "<h3>The heaviest experts together</h3>",
        "<p>The k heaviest active experts of a token are changed together there. The mean is of a distribution with "
        "heavy tails, so beside it stand the median, which says what becomes of most tokens, and the 95th percentile."
        "</p>",
    ]
    for label, of_label in rows.items():
        parts.append(f"<h4>{escape(label)}</h4>" if len(tables.labels) > 1 else "")
        parts += [progressive_figure(tables, label), progressive_table(of_label)]
    return "\n".join(parts)


def _redistribution(tables: AuditTables) -> str:
    if tables.redistribution.empty:
        return ""
    rows = by_label(rows_of("redistribution", tables.redistribution))
    parts = [
        "<h3>How much of an expert’s output the rest of the layer also writes</h3>",
        "<p>Spearman’s ρ over the experts of a layer, of means over the tokens where each is active. The gap norm is "
        "how far the layer’s output moves without the expert; the relative compensation is how much of the lost vector "
        "the rest of the layer writes too, in the same run: nothing reacts to the loss, and where the rest points the "
        f"other way it counts as 0. Intervals are of {_confidence(tables)}, over documents drawn anew; those over "
        "experts drawn anew, which are wider, are among all columns. p takes experts for independent and is not "
        "corrected for the number of layers and pairs.</p>",
        redistribution_figure(tables),
    ]
    for label, of_label in rows.items():
        parts.append(f"<h4>{escape(label)}</h4>" if len(tables.labels) > 1 else "")
        parts.append(redistribution_table(of_label))
    return "\n".join(parts)


def _confidence(tables: AuditTables) -> str:
    """Of the intervals of correlations; several where models differ."""
    found = [(one.get("redistribution") or {}).get("confidence", 0.95) for one in tables.provenance]
    return " or ".join(f"{100 * value:g}%" for value in dict.fromkeys(found))
