"""One routing decision at a time, to click through: as a part of a page, as a page, and below a corpus's measures.

The reader picks a document, a token, a router and an expert, and sees which senders brought that expert over the
boundary of the choice or kept it below, and the rank it would have without each of them. Everything is in the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from moe_lens.corpus import TokenBatches
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.page import MEASURES_NOTE, closing_html, figure_html, page_html, stripes_html, table, write_page
from moe_lens.plots import MEASURE_NAMES, POSITION_NAMES, UNITS, expert_lines, own_block_head_map
from moe_lens.plots.values import influence
from moe_lens.routing.result import RoutingContributions
from moe_lens.routing_page_data import RoutingDecisions, routing_decisions


def routing_section(decisions: RoutingDecisions) -> str:
    """The part of the page, as HTML; the page must have `routing_css` too. Once in a page."""
    # Divided, not replaced one after the other: the data may hold any text, the template's marks too.
    before, between, after = re.split(r"\{\{data\}\}|\{\{script\}\}", _asset("routing_page.html"))
    return "".join([before, decisions.json, between, _asset("routing_page.js"), after])


def routing_css() -> str:
    """The look of `routing_section`, beyond what all pages share."""
    return _asset("routing_page.css")


def routing_page_html(decisions: RoutingDecisions, model_name: str) -> str:
    """A page of nothing but `routing_section`, as text."""
    title = f"Routing decisions of {model_name}"
    body = f"<h1>{escape(title)}</h1>\n{routing_section(decisions)}"
    return page_html(title, body, css=routing_css(), figures=False)


def write_routing_page(
    model: HookedMoE,
    batches_or_documents: TokenBatches | Iterable[Any] | Tensor | str,
    path: str | Path,
    **settings: Any,
) -> Path:
    """Write a page on which routing decisions can be looked at one by one. It needs no other file.

    Args:
        settings: those of `routing_decisions`.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: see `routing_decisions`.
    """
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(Path(path).parent)!r} to write the page into")
    decisions = routing_decisions(model, batches_or_documents, **settings)
    return write_page(routing_page_html(decisions, model.cfg.model_name), path)


# ---- what a corpus says ----

_N_TOP = 6
# What a granularity divides components into.
_PARTS = {"head": "heads", "source": "pairs of head and source", "expert": "experts", "neuron": "neurons"}
# The tables of a granularity: measure and position class, the first of them open.
_TABLES = (
    ("variance", "rest"),
    ("variance", "lead"),
    ("aps", "rest"),
    ("ans", "rest"),
    ("aarv", "rest"),
    ("overlap", "rest"),
    ("weight_change", "rest"),
)


def write_contributions_page(
    results: Mapping[str, RoutingContributions], path: str | Path, *, routing: RoutingDecisions | None = None
) -> Path:
    """Write a page of a corpus's measures: figures, and the largest senders of every router at every granularity.

    Args:
        results: by granularity, as `routing_contributions` gives them for several.
        routing: decisions to look at one by one, below them.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: no results.
    """
    return write_page(contributions_page_html(results, routing=routing), path)


def contributions_page_html(
    results: Mapping[str, RoutingContributions], *, routing: RoutingDecisions | None = None
) -> str:
    """The page as text; see `write_contributions_page`.

    Raises:
        ValueError: no results.
    """
    if not results:
        raise ValueError("there are no results to show")
    first = next(iter(results.values()))
    name = str(first.provenance["model"])
    has_wholes = any(result.by == "layer" for result in results.values())
    sections = [_granularity_section(result, has_wholes) for result in results.values()]
    if routing is not None:
        sections.append(routing_section(routing))
    n_tokens = sum(first.n_tokens.values())
    body = f"""<h1>What moves the routers of {escape(name)}</h1>
<p class="lead">Every router's scores, taken apart exactly into what earlier components wrote, as means over
{first.n_documents["lead"]:,} documents, {n_tokens:,} tokens in all. The lead token of each document is kept apart, on
scales of its own.</p>
{"".join(sections)}
{_provenance_section(first)}"""
    return page_html(f"Routing of {name}", body, css=routing_css())


def _granularity_section(result: RoutingContributions, has_wholes: bool) -> str:
    """A granularity's part; `has_wholes` if another one has whole components."""
    parts = [
        f"<h2>Senders by {escape(result.by)}</h2>",
        f"<p>{len(result.senders):,} senders, {len(result.receivers):,} routers. {closing_html(result)}</p>",
        _figures(result),
    ]
    parts += _top_tables(result, _parts_of(result), _PARTS.get(result.by, "senders"))
    if result.by != "layer" and not has_wholes:
        parts += _top_tables(result, ~_parts_of(result), "whole components")
    return "\n".join(parts)


def _figures(result: RoutingContributions) -> str:
    if result.by == "layer":
        return stripes_html(result)
    drawn = []
    if result.by == "head":
        drawn = [own_block_head_map(result, "variance", position) for position in ("rest", "lead")]
    elif result.by == "expert":
        drawn = [expert_lines(result, measure="variance", position=position) for position in ("rest", "lead")]
    return f'<div class="figures">{"".join(map(figure_html, drawn))}</div>' if drawn else ""


def _parts_of(result: RoutingContributions) -> np.ndarray:
    """Which senders are parts of a component, and so what this granularity adds; by layer, all are."""
    kinds = [(group.kind != "whole" or result.by == "layer", len(group)) for group in result.senders.groups]
    return np.concatenate([np.full(n, is_part) for is_part, n in kinds])


def _top_tables(result: RoutingContributions, among: np.ndarray, what: str) -> list[str]:
    # Where there are very many senders, one table is slow enough.
    tables = _TABLES[:1] if result.by in ("neuron", "source") else _TABLES
    parts = []
    for i, (measure, position) in enumerate((m, p) for m, p in tables if m in result.measures):
        title = f"{MEASURE_NAMES[measure]}, {POSITION_NAMES[position]}"
        parts.append(
            f"<details{'' if i else ' open'}><summary>The largest {what} at each router: {escape(title)}</summary>"
            f"{_top_table(result, measure, position, among)}</details>"
        )
    return parts


def _top_table(result: RoutingContributions, measure: str, position: str, among: np.ndarray) -> str:
    values = result.measure(measure)[position]
    sizes = np.where(among[:, None], influence(measure, values), np.nan)
    rows = []
    for column, receiver in enumerate(result.receivers):
        there = np.flatnonzero(~np.isnan(sizes[:, column]))
        best = there[np.argsort(-sizes[there, column], kind="stable")[:_N_TOP]]
        named = [f"{result.senders[int(i)]} {values[i, column]:.3g}" for i in best]
        rows.append([receiver, *(named or ["none comes before it"]), *[""] * (_N_TOP - max(len(named), 1))])
    place = "smallest" if measure == "overlap" else "largest"
    unit = f" ({UNITS[measure]})" if UNITS[measure] else ""
    return table(["router", f"{place}{unit}", *(str(i) for i in range(2, _N_TOP + 1))], rows)


def _provenance_section(result: RoutingContributions) -> str:
    facts = {
        name: "; ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in result.provenance.items()
    }
    listed = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(str(value))}</dd>"
        for name, value in facts.items()
        if value not in (None, "")
    )
    return f"""<h2>What this is of</h2>
<dl class="facts">{listed}</dl>
<p class="note">{MEASURES_NOTE}</p>"""


@cache
def _asset(name: str) -> str:
    return (files("moe_lens.assets") / name).read_text(encoding="utf-8")
