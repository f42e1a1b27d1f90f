"""Rows of the saved tables as HTML: every number says of which row and column of which file it is.

An element with `data-row="audit:17" data-column="d"` shows the value of column `d` in row 17, from 0, of
`audit.parquet`, rounded. One with `data-count="audit"` shows how many rows of that file have the values that
`data-where` has, as JSON; `{"at most": 0.05}` stands for every value up to this one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from numbers import Integral, Real
from typing import Any

import pandas as pd

MISSING = "–"
LOW = "ranked by low values: the lowest claims to be the most important"
SMALLEST_P = 1e-300
"""A smaller p is shown as being below this: no test here is that exact."""

_THREE_DECIMALS = (
    "d", "d_low", "d_high", "rank_biserial", "rho", "low", "high", "low_experts", "high_experts", "spearman", "kendall",
    "mean", "median", "p95",
)  # fmt: skip
_TWO_DECIMALS = ("t", "t_plain", "log_bayes_factor", "log_odds")
_ERRORS_THREE_DECIMALS = ("d_standard_error", "detectable_d")
_UNSIGNED = ("gap_norm", "bayes_factor", "rank_r_squared", "odds_design_effect", "value", "tolerance")
_SIGNIFICANT = ("bayes_factor", "value", "tolerance")
_NOT_P = ("p95",)
_OF_COMPARISON = ("rank_", "log_odds", "posterior", "odds_")


def p_shown(p: float) -> str:
    """0.012, or 1.3e-05; never 0."""
    if p < SMALLEST_P:
        return f"<{SMALLEST_P:.0e}"
    return f"{p:.3f}" if p >= 0.01 else f"{p:.4f}" if p >= 0.001 else f"{p:.1e}"


def number_shown(value: Any, column: str) -> str:
    """A value of a table as text, rounded as its column wants; a missing one is a dash."""
    if isinstance(value, str) or value is None:
        return MISSING if value is None else value
    if isinstance(value, bool) or type(value).__name__ == "bool_":
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return str(value) if column == "layer" else f"{int(value):,}".replace("-", "−")
    if not isinstance(value, Real):
        return str(value)
    number = float(value)
    if math.isnan(number):
        return MISSING
    if math.isinf(number):
        return "∞" if number > 0 else "−∞"
    if (column == "p" or column.startswith(("p_", "posterior"))) and column not in _NOT_P:
        return p_shown(number)
    text = _float_shown(number, column)
    # Only the sign: an exponent keeps the character that other programs read.
    return "−" + text[1:] if text.startswith("-") else text


def _float_shown(number: float, column: str) -> str:
    if column in _THREE_DECIMALS:
        return f"{number:+.3f}"
    if column in _TWO_DECIMALS:
        return f"{number:+.2f}"
    if column in _ERRORS_THREE_DECIMALS:
        return f"{number:.3f}"
    if column.startswith("n_") or column == "df":
        return f"{number:,.1f}".removesuffix(".0")
    sign = "" if column.endswith(("standard_error", "gap_norm")) or column in _UNSIGNED else "+"
    size = abs(number)
    if size == 0:
        return "0"
    if column in _SIGNIFICANT or size >= 100:
        return f"{number:{sign}.3g}"
    # As for p: aligned where that says something.
    return f"{number:{sign}.4f}" if size >= 0.001 else f"{number:{sign}.1e}"


@dataclass(frozen=True, eq=False)
class Row:
    """A row of a saved table.

    Attributes:
        table: which, as its file is called.
        number: of the row, from 0.
        values: by column.
    """

    table: str
    number: int
    values: Mapping[str, Any]

    def __getitem__(self, column: str) -> Any:
        return self.values[column]

    @property
    def name(self) -> str:
        return f"{self.table}:{self.number}"

    @property
    def anchor(self) -> str:
        """What a link on the page leads to."""
        return f"{self.table}-{self.number}"

    def shown(self, column: str) -> str:
        """As text. Published numbers, and ours beside them, are rounded as what they are of."""
        like = self.values["quantity"] if column in ("published", "ours") else column
        # The paper has three decimals of it, as of means.
        return number_shown(
            self.values[column], "mean" if like == "mean_gap_norm" and like != column else like
        )

    def html(
        self,
        column: str,
        *,
        tag: str = "span",
        css: str = "",
        link: str = "",
        title: str = "",
    ) -> str:
        """An element with the value of a column, traceable.

        Args:
            tag: of the element.
            css: its classes.
            link: the anchor that it leads to.
            title: what hovering says.
        """
        text = self.shown(column)
        said = title or self._reason(column, text)
        attributes = f' data-row="{self.name}" data-column="{escape(column)}"'
        attributes += f' class="{css}"' if css else ""
        attributes += f' title="{escape(said)}"' if said else ""
        inner = escape(text)
        if link:
            inner = f'<a href="#{escape(link)}">{inner}</a>'
        return f"<{tag}{attributes}>{inner}</{tag}>"

    def cell(self, column: str, css: str = "", **more: Any) -> str:
        """A cell of a table; numbers are aligned as such."""
        is_number = isinstance(self.values[column], Real) and not isinstance(self.values[column], bool)
        classes = " ".join(filter(None, ("number" if is_number else "", css)))
        return self.html(column, tag="td", css=classes, **more)

    @property
    def direction(self) -> str:
        """A mark, as HTML, where the lowest values are those that the metric claims most for; else empty."""
        if self.values.get("higher_is_more_important", True):
            return ""
        return f' <span class="kind" title="{LOW}">(low)</span>'

    def interval(self, low: str, high: str) -> str:
        """Two columns as [low, high]."""
        if self.shown(low) == self.shown(high) == MISSING:
            return self.html(low)
        return f"[{self.html(low)}, {self.html(high)}]"

    def _reason(self, column: str, text: str) -> str:
        """Why there is no number, or what a number stands for."""
        if text.startswith("<"):
            return "the computed p is below what is shown"
        if text == "∞":
            return "larger than any number that is stored, or infinite by definition"
        if text != MISSING:
            return ""
        if self.values.get("n_pairs", 2) < 2:
            return "fewer than two pairs"
        if column == "rho" and self.table == "audit":
            return "only the control routing_weight has it, where the ratio of weights and the loss difference vary"
        if column.startswith(_OF_COMPARISON):
            return "fewer than two documents have rows to compare"
        if column.endswith("standard_error"):
            return "fewer than two documents"
        if column == "ours":
            return "not among these audits"
        return "not defined here"


def rows_of(table: str, frame: pd.DataFrame) -> list[Row]:
    """The rows of a table, numbered as in its file."""
    return [Row(table, i, values) for i, values in enumerate(frame.to_dict("records"))]  # type: ignore[arg-type]


def at_most(value: float) -> dict[str, float]:
    """What `data-where` says of a column whose values are counted up to this one."""
    return {"at most": value}


def has(row: Row, name: str, wanted: Any) -> bool:
    """Whether a row has this value, or one up to it; a missing number has none."""
    return bool(row[name] <= wanted["at most"] if isinstance(wanted, dict) else row[name] == wanted)


def count_html(table: str, rows: Iterable[Row], where: Mapping[str, Any], *, tag: str = "span") -> str:
    """How many of the rows have these values, traceable.

    Args:
        table: that the rows are of.
        rows: all of them, or at least all that have these values.
        where: values by column, each a value or `at_most`.
    """
    n = sum(all(has(row, name, value) for name, value in where.items()) for row in rows)
    css = ' class="number"' if tag == "td" else ""
    return f'<{tag}{css} data-count="{table}" data-where="{escape(json.dumps(where))}">{n:,}</{tag}>'


def rows_table(
    rows: Sequence[Row],
    columns: Sequence[str | tuple[str, str, str]],
    more: Sequence[str] = (),
    *,
    names: Mapping[str, str] | None = None,
    anchors: bool = False,
    lead: str = "",
) -> str:
    """A table with a line for each row, which begins with the row's number.

    Args:
        rows: of one saved table.
        columns: names of columns, or (what it is called, column of the lower end, of the upper end) for intervals.
        more: columns that are shown on request.
        names: what columns are called, where not as they are.
        anchors: whether links may lead to its lines; once for each row of a page.
        lead: HTML above the head, a caption.
    """
    called = {} if names is None else names
    head = '<th class="number">row</th>'
    for column in columns:
        name = called.get(column, column) if isinstance(column, str) else column[0]
        numeric = not isinstance(column, str) or (bool(rows) and isinstance(rows[0][column], Real))
        head += f'<th class="number">{escape(name)}</th>' if numeric else f"<th>{escape(name)}</th>"
    for column in more:
        numeric = " number" if bool(rows) and isinstance(rows[0][column], Real) else ""
        head += f'<th class="more{numeric}">{escape(called.get(column, column))}</th>'
    lines = []
    for row in rows:
        at = f' id="{row.anchor}"' if anchors else ""
        line = f'<th scope="row" class="number row">#{row.number}</th>'
        for column in columns:
            if not isinstance(column, str):
                line += f'<td class="interval">{row.interval(*column[1:])}</td>'
            elif column == "metric" and row.direction:
                line += f"<td>{row.html(column)}{row.direction}</td>"
            else:
                line += row.cell(column, css=_verdict_css(row, column))
        line += "".join(row.cell(column, css="more") for column in more)
        lines.append(f"<tr{at}>{line}</tr>")
    return (
        f'<div class="wide"><table class="rows">{lead}<thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _verdict_css(row: Row, column: str) -> str:
    return f"verdict {row[column]}" if column == "verdict" else ""
