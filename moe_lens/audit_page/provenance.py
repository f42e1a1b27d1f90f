"""What an audit's numbers are of: models, weights, corpora, settings and versions, as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any

from moe_lens.audit.audit_tables import AuditTables

_FIRST = ("revision", "dtype", "weights", "corpus", "tokens", "sample", "versions", "seconds")
"""Of the census, which are shown before anything is opened."""
_LONG = (
    "documents",
    "definitions",
    "audits",
    "progressive",
    "redistribution",
    "census",
    "metric_table",
    "asked",
)


def provenance_section(tables: AuditTables) -> str:
    """Model, weights, corpus and versions of each model; of every stage on request."""
    parts = ["<h2>What this is of</h2>"]
    for one in tables.provenance:
        on = one["verified"]
        facts = {
            "model": one["model"],
            "family": one["model_type"],
            "verified": f"in {on['dtype']}, {on['n_tokens']:,} tokens of {on['n_documents']:,} documents",
        }
        stages = list(_stages(one))
        if stages:
            first = stages[0][1]
            facts |= {name: first[name] for name in _FIRST if name in first}
        parts += [f"<h3>{escape(one['label'])}</h3>", _facts(facts)]
        parts += [f"<details><summary>{escape(name)}</summary>{_facts(of)}</details>" for name, of in stages]
    parts.append(
        '<p class="note">Protocol, controls, progressive removal and redistribution as in “From Observation to '
        "Intervention: A Causal Audit of Expert Importance in Mixture-of-Experts Models” (arXiv:2606.10703), there at "
        "a sample of positions.</p>"
    )
    return "\n".join(parts)


def _stages(one: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What was run, by name, each once: a census and a metric table may be of several audits."""
    censuses, metrics, audits = [], [], []
    for found in one["audits"]:
        table = found.get("metric_table") or {}
        released = f", metrics as released for {table['as_released']}" if table.get("as_released") else ""
        scope = f"{found.get('scope')} scope"
        audits.append((f"Audit, {scope}{released}", found))
        for before, name, facts in (
            (censuses, f"Census, {scope}", found.get("census")),
            (metrics, f"Metrics{released}", table),
        ):
            if facts and not any(facts == other for _, other in before):
                before.append((name, facts))
    yield from (*censuses, *metrics, *audits)
    for name in ("progressive", "redistribution"):
        if one[name] is not None:
            yield name.capitalize(), one[name]


def _facts(facts: Mapping[str, Any]) -> str:
    listed = "".join(
        f"<dt>{escape(str(name).replace('_', ' '))}</dt><dd>{_fact(value)}</dd>"
        for name, value in facts.items()
        if value not in (None, "", [], {}) and name not in ("kind", *_LONG)
    )
    parts = [f'<dl class="facts">{listed}</dl>']
    documents = facts.get("documents")
    if documents:
        names = escape(", ".join(map(str, documents)))
        parts.append(f"<details><summary>All documents</summary><p>{names}</p></details>")
    definitions = facts.get("definitions")
    if definitions:
        parts.append(f"<details><summary>Definitions</summary>{_facts(definitions)}</details>")
    return "".join(parts)


def _fact(value: Any) -> str:
    """As HTML."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{escape(str(name).replace('_', ' '))} {_fact(item)}" for name, item in value.items()
        )
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(map(_fact, value))
    return escape(str(value)) if value is not None else "none"
