"""Our numbers beside those of the published audit, and where that audit contradicts itself, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from moe_lens.audit.audit_tables import AuditTables
from moe_lens.audit.published import CONTRADICTIONS, Contradiction, PublishedCell
from moe_lens.audit.published_beside import SIDES
from moe_lens.audit_page.experiments import Experiment, counted
from moe_lens.audit_page.numbers import Row, rows_of, rows_table

TITLES = {
    1: "the metrics, OLMoE",
    2: "the metrics, Qwen1.5-MoE",
    3: "the metrics, DeepSeek-V2-Lite",
    4: "the control, OLMoE",
    5: "the control, Qwen1.5-MoE",
    6: "the control, DeepSeek-V2-Lite",
    7: "redistribution, Qwen1.5-MoE",
    8: "progressive removal, OLMoE, means",
    9: "progressive removal, OLMoE, tails",
}
_NAMES = {
    "p_t": "p, t",
    "p_wilcoxon": "p, ranks",
    "mean": "mean, nats",
    "median": "median, nats",
    "p95": "95th percentile, nats",
    "mean_gap_norm": "mean gap norm",
    "rho": "ρ",
}
_NO_OURS = "not among these audits"
Place = tuple[str, int, int]
"""Metric, layer, and how many experts are removed."""


def published_section(tables: AuditTables, experiments: Sequence[Experiment]) -> str:
    """All of it; nothing where no audited model is one of the published audit's."""
    rows = rows_of("published", tables.published)
    if not rows:
        return ""
    kinds = {row.name: one.kind for one in experiments for row in one.rows}
    parts = [
        "<h2>Beside the published audit</h2>",
        "<p>Its numbers beside ours, each the one that is computed most like it: where the published test takes "
        "positions for independent, so does the p of ours here. What still differs (definition, statistic, scope, "
        "sampling, corpus) is said under each table, and of every number in its row.</p>",
    ]
    for label in dict.fromkeys(row["label"] for row in rows):
        of_label = [row for row in rows if row["label"] == label]
        parts.append(f"<h3>{escape(label)}</h3>")
        for number in dict.fromkeys(row["table"] for row in of_label):
            parts.append(_table([row for row in of_label if row["table"] == number], int(number), kinds))
        every = rows_table(of_label, list(of_label[0].values), anchors=True)
        parts.append(f"<details><summary>All rows of {escape(label)}</summary>{every}</details>")
        parts.append(_contradictions(of_label, kinds))
    return "\n".join(parts)


def _kind_of(row: Row, kinds: Mapping[str, str]) -> str:
    """What column ours stands in."""
    return kinds.get(row["ours_row"], "ours") if row["ours_row"] else ""


def _table(rows: Sequence[Row], number: int, kinds: Mapping[str, str]) -> str:
    quantities = list(dict.fromkeys(row["quantity"] for row in rows))
    ours = [kind for kind in dict.fromkeys(_kind_of(row, kinds) for row in rows) if kind]
    by_place: dict[Place, dict[tuple[str, str], Row]] = {}
    for row in rows:
        place = (row["metric"], int(row["layer"]), int(row["removed"]))
        by_place.setdefault(place, {})[(row["quantity"], _kind_of(row, kinds))] = row
    removed = any(k for _, _, k in by_place)
    several = len({metric for metric, _, _ in by_place}) > 1
    first = [*(["metric"] if several else []), "layer", *(["k"] if removed else [])]
    top = "".join(f"<th rowspan=2{'' if name == 'metric' else ' class=number'}>{name}</th>" for name in first)
    top += "".join(
        f'<th class="number group" colspan={1 + max(len(ours), 1)}>{escape(_NAMES.get(str(name), str(name)))}</th>'
        for name in quantities
    )
    names = "".join(f'<th class="number">{escape(_short(kind))}</th>' for kind in ours or ["ours"])
    under = f'<th class="number group">paper</th>{names}' * len(quantities)
    lines, without = [], []
    for (metric, _, _), found in by_place.items():
        some = next(iter(found.values()))
        has_ours = any(row["ours_row"] for row in found.values())
        line = f'<th scope="row">{escape(metric)}</th>' if several else ""
        line += some.cell("layer")
        line += some.cell("removed") if removed else ""
        line += "".join(_beside(found, quantity, ours) for quantity in quantities)
        (lines if has_ours else without).append(f"<tr>{line}</tr>")

    def table(of: Sequence[str]) -> str:
        return f"""<div class="wide"><table class="beside"><thead><tr>{top}</tr><tr>{under}</tr></thead>
<tbody>{"".join(of)}</tbody></table></div>"""

    parts = [f"<h4>Table {number}: {escape(TITLES.get(number, ''))}</h4>"]
    parts += [table(lines)] if lines else []
    if without:
        n = counted(len(without), "line")
        parts.append(f"<details><summary>{n} without a number of ours</summary>{table(without)}</details>")
    return "\n".join([*parts, _what_each_is(rows, kinds)])


def _short(kind: str) -> str:
    return f"ours, {kind}" if kind != "ours" else kind


def _beside(found: Mapping[tuple[str, str], Row], quantity: str, ours: Sequence[str]) -> str:
    rows = {kind: row for (of, kind), row in found.items() if of == quantity}
    if not rows:
        return '<td class="group"></td>' + "<td></td>" * max(len(ours), 1)
    first = next(iter(rows.values()))
    cells = first.cell("published", css="group")
    for kind in ours or [""]:
        row = rows.get(kind)
        if row is None:
            cells += f'<td class="number" title="{_NO_OURS}">–</td>'
        else:
            cells += row.cell(
                "ours",
                link=row["ours_row"].replace(":", "-"),
                title=_of_ours(row),
            )
    return cells


def _of_ours(row: Row) -> str:
    """What hovering over a number of ours says: of how many positions it is, or why there is none."""
    if row["ours_row"]:
        return f"row {row['ours_row']}: {row['ours_sampling']}"
    return row["ours_definition"] or _NO_OURS


def _what_each_is(rows: Sequence[Row], kinds: Mapping[str, str]) -> str:
    """What each side is, a line for each thing that is said: once where it is the same for all rows."""
    sides = {"paper": list(rows)}
    for row in rows:
        if row["ours_row"]:
            sides.setdefault(_short(_kind_of(row, kinds)), []).append(row)
    lines = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(
            f"<td>{_said(of, 'published' if side == 'paper' else 'ours', name)}</td>"
            for side, of in sides.items()
        )
        + "</tr>"
        for name in SIDES
    )
    # Where there is a text without a number, it says why there is none.
    without = {row["ours_definition"]: row for row in rows if not row["ours_row"] and row["ours_definition"]}
    why = "".join(f'<p class="bad">{row.html("ours_definition")}</p>' for row in without.values())
    head = "".join(f"<th>{escape(side)}</th>" for side in sides)
    return f"""{why}<details class="sides"><summary>What each is: {", ".join(SIDES)}</summary>
<div class="wide"><table><thead><tr><th></th>{head}</tr></thead>
<tbody>{lines}</tbody></table></div></details>"""


def _said(rows: Sequence[Row], of: str, name: str) -> str:
    """What the rows of a side say of one thing, each text once; definitions by metric, statistics by quantity."""
    texts: dict[tuple[str, str], Row] = {}
    for row in said_by(rows, of, name):
        texts.setdefault((row[_said_of(row, name)] if _said_of(row, name) else "", row[f"{of}_{name}"]), row)
    parts = []
    for row in texts.values():
        whose = _said_of(row, name)
        parts.append((f"<i>{row.html(whose)}</i>: " if whose else "") + row.html(f"{of}_{name}"))
    return "<br>to ".join(parts) if name == "sampling" else "<br>".join(parts)


def _said_of(row: Row, name: str) -> str:
    """The column that tells apart what is said: of the definition of a metric, and of a statistic."""
    if name == "statistic":
        return "quantity"
    return "metric" if name == "definition" and row["family"] == "metrics" else ""


def said_by(rows: Sequence[Row], of: str, name: str) -> list[Row]:
    """Rows that between them say all there is to say of a side.

    Of samplings, which differ with what ties at a layer, the one with the fewest positions and the one with the most:
    every other is in its row, and in what hovering says.

    Args:
        rows: with numbers of that side.
        of: `published` or `ours`.
        name: one of `SIDES`.
    """
    if name == "sampling" and len({row[f"{of}_sampling"] for row in rows}) > 1:
        by_number = sorted(
            rows, key=lambda row: (row[f"{of}_n"], len(row[f"{of}_sampling"]), row[f"{of}_sampling"])
        )
        return [by_number[0], by_number[-1]]
    return list(rows)


# ---- where it contradicts itself ----


def _contradictions(rows: Sequence[Row], kinds: Mapping[str, str]) -> str:
    """Those that are about this model's tables: what is said, and the cells that say otherwise."""
    tables = {int(row["table"]) for row in rows}
    about = [(cell, one.column) for one in CONTRADICTIONS for cell in one.cells if cell.table in tables]
    ours = [_kind_of(row, kinds) for cell, column in about for row in _rows_of_cell(rows, cell, column)]
    ours = [kind for kind in dict.fromkeys(ours) if kind]
    parts = [
        # With those of the other tables, as what is wrong may be between them.
        _contradiction(one, one.cells, rows, kinds, ours)
        for one in CONTRADICTIONS
        if any(cell.table in tables for cell in one.cells)
    ]
    if not parts:
        return ""
    heads = "".join(f'<th class="number">{escape(_short(kind))}</th>' for kind in ours)
    return f"""<h4>Where the paper contradicts itself</h4>
<p>Both sides are as published; ours is beside them.</p>
<div class="wide"><table class="contradictions"><thead><tr><th>it says</th><th>but of</th><th class="number">it has</th>
{heads}<th>why</th></tr></thead><tbody>{"".join(parts)}</tbody></table></div>"""


def _contradiction(
    one: Contradiction,
    cells: Sequence[PublishedCell],
    rows: Sequence[Row],
    kinds: Mapping[str, str],
    ours: Sequence[str],
) -> str:
    """A line for each cell, between what is said and why that is wrong."""
    claimed = f" ({', '.join(f'{value:g}' for value in one.claimed)})" if one.claimed else ""
    over = f" rowspan={len(cells)}"
    said = f'<td{over}>“{escape(one.said)}”{claimed}<br><span class="kind">{escape(one.where)}</span></td>'
    why = f"<td{over}>{escape(one.why)}</td>"
    lines = []
    for i, cell in enumerate(cells):
        same = _rows_of_cell(rows, cell, one.column)
        quantity = escape(_NAMES.get(one.column, one.column))
        line = (
            f'<th scope="row">{quantity} of {escape(cell.metric)}, M{cell.layer} <span class="kind">table '
            f"{cell.table}: {escape(TITLES.get(cell.table, ''))}</span></th>"
        )
        line += same[0].cell("published") if same else f"<th>{getattr(cell, one.column):g}</th>"
        by_kind = {_kind_of(row, kinds): row for row in same}
        line += "".join(
            by_kind[kind].cell("ours", link=by_kind[kind]["ours_row"].replace(":", "-"))
            if kind in by_kind
            else "<td></td>"
            for kind in ours
        )
        lines.append(f"<tr>{said if i == 0 else ''}{line}{why if i == 0 else ''}</tr>")
    return "".join(lines)


def _rows_of_cell(rows: Sequence[Row], cell: PublishedCell, column: str) -> list[Row]:
    wanted: dict[str, Any] = {
        "table": cell.table,
        "metric": cell.metric,
        "layer": cell.layer,
        "quantity": column,
    }
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]
