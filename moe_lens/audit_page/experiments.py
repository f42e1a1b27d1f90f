"""The experiments of an audit's tables, and what they found in words, as HTML.

An experiment is one way of ablating one model's experts (scope and how), with one set of definitions of the metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, cast

import pandas as pd

from moe_lens.audit.audit_tables import AuditTables
from moe_lens.audit_page.numbers import Row, count_html, rows_of

VERDICTS = ("valid", "inverted", "disagreement", "equivalent", "inconclusive")
"""In the order in which they are told."""
POSITIVE_CONTROL, BASELINE = "first_order", "random"
_MOST_NAMED = 12

HOW = {
    "zero": "an expert’s contribution is set to zero",
    "renormalize": "an expert’s contribution is set to zero, and the other routing weights grow to the same sum,",
    "reroute": "an expert cannot be chosen, and the next-ranked takes its slot,",
    "mean": "an expert’s output is replaced by its mean over a reference corpus",
    "resample": "an expert’s output is replaced by its output at another token where it was active,",
}
SCOPES = {
    "token": "at one token, and the loss of the next token is read there",
    "sequence": "wherever it is active in the document, and the loss of the next token is read at one token where it "
    "is",
}
_IDENTITY = ["label", "scope", "how", "as_released"]
_CELL = ["family", "metric", "layer"]


@dataclass(frozen=True, eq=False)
class Experiment:
    """The rows of one experiment.

    Attributes:
        label, scope, how, as_released: as in the table; `as_released` is empty for the definitions of this package.
        number: 1, or which of several that are the same in all of this.
        rows: of the table `audit`.
        frame: these rows, with their numbers as index.
        facts: the provenance of its audit; empty where the tables have none.
    """

    label: str
    scope: str
    how: str
    as_released: str
    number: int
    rows: tuple[Row, ...]
    frame: pd.DataFrame
    facts: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of which there is one."""
        return f"{self.label}, {self.kind}"

    @property
    def kind(self) -> str:
        """What it is, but for the model."""
        parts = [f"{self.scope} scope"]
        parts += [] if self.how == "zero" else [self.how]
        parts += [f"metrics as released for {self.as_released}"] if self.as_released else []
        parts += [f"number {self.number}"] if self.number > 1 else []
        return ", ".join(parts)

    @property
    def identity(self) -> dict[str, str]:
        """Columns that all its rows share; with several of one kind they share them with others."""
        return {name: getattr(self, name) for name in _IDENTITY}

    @property
    def layers(self) -> list[int]:
        return sorted({int(row["layer"]) for row in self.rows})

    @property
    def metrics(self) -> list[tuple[str, str]]:
        """(family, metric), in the table's order."""
        return list(dict.fromkeys((row["family"], row["metric"]) for row in self.rows))

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.facts.get("settings", {})

    def of(self, **values: Any) -> list[Row]:
        """Its rows that have these values."""
        return [row for row in self.rows if all(row[name] == value for name, value in values.items())]

    def count(self, **values: Any) -> str:
        """How many of its rows have these values, traceable."""
        rows = self.of(**values)
        if self.number > 1 or self.facts.get("_several"):
            return f"<span>{len(rows):,}</span>"
        return count_html("audit", rows, {**self.identity, **values})


def experiments_of(tables: AuditTables) -> list[Experiment]:
    """In the order of the table. Two censuses of one kind are two experiments."""
    frame = tables.audit
    if frame.empty:
        return []
    rows = rows_of("audit", frame)
    numbered = frame.reset_index(drop=True)
    number = numbered.groupby([*_IDENTITY, *_CELL], sort=False).cumcount() + 1
    facts = {one["label"]: one["audits"] for one in tables.provenance}
    groups = numbered.groupby([*_IDENTITY, number], sort=False).indices
    found = []
    for key, places in groups.items():
        label, scope, how, as_released, which = cast(tuple[str, str, str, str, int], key)
        of_kind = [
            one
            for one in facts.get(label, [])
            if (one.get("scope"), one.get("how")) == (scope, how)
            and ((one.get("metric_table") or {}).get("as_released") or "") == as_released
        ]
        several = (label, scope, how, as_released, 2) in groups
        own = dict(of_kind[which - 1]) if which <= len(of_kind) else {}
        found.append(
            Experiment(
                label=label,
                scope=scope,
                how=how,
                as_released=as_released,
                number=int(which),
                rows=tuple(rows[i] for i in places),
                frame=numbered.loc[places],
                facts={**own, "_several": several},
            )
        )
    return found


# ---- what was done ----


def what_was_done(experiment: Experiment) -> str:
    """In a sentence, as HTML."""
    rows = experiment.rows
    families = [family for family, _ in experiment.metrics]
    most = max(rows, key=lambda row: row["n_positions"])
    documents = max(rows, key=lambda row: row["n_documents"])
    up_to = "" if len({row["n_positions"] for row in rows}) == 1 else "up to "
    positions = f"{up_to}{most.html('n_positions')} positions in {documents.html('n_documents')} documents"
    metrics = families.count("metrics")
    of = f"{metrics} metric{'' if metrics == 1 else 's'} and {families.count('control')} controls"
    layers = experiment.layers
    said = (
        f"{HOW.get(experiment.how, escape(experiment.how))} {SCOPES.get(experiment.scope, escape(experiment.scope))}. "
        f"{of} at {len(layers)} layer{'' if len(layers) == 1 else 's'}, {positions}."
    )
    said = f"<b>{escape(experiment.name)}</b>: {said}"
    if experiment.settings.get("n") is not None:
        said += " The positions are drawn for each cell."
    if experiment.settings.get("compare", 1) != 1:
        said += (
            f" The mean of the {experiment.settings['compare']} highest is compared with that of the lowest."
        )
    if experiment.as_released:
        said += (
            f" The metrics are those of the published audit’s released code for "
            f"<code>{escape(experiment.as_released)}</code>, which differ from what the paper names."
        )
    if experiment.facts.get("same_corpus") is False:
        said += " The metrics are of another corpus."
    if experiment.facts.get("census_finished") is False:
        said += ' <b class="bad">The census is not finished.</b>'
    return said


# ---- what was found ----


def answer(experiment: Experiment) -> str:
    """What it found, in words, as HTML."""
    return (
        f"<p><b>{escape(experiment.name)}.</b> {_verdicts(experiment)} {_best(experiment)}</p>"
        f"<p>{_positive_control(experiment)} {_others(experiment)}</p>"
    )


def _verdicts(experiment: Experiment) -> str:
    if not experiment.of(family="metrics"):
        return "Only controls were audited."
    effect = experiment.settings.get("smallest_effect")
    than = "" if effect is None else f" (|d| below {effect:g})"
    said = {
        "valid": "valid",
        "inverted": "inverted",
        "disagreement": "where the two tests disagree",
        "equivalent": f"equivalent to no effect{than}",
        "inconclusive": "inconclusive",
    }
    parts = [
        f"{experiment.count(family='metrics', verdict=name)} {text}"
        for name, text in said.items()
        if name in ("valid", "inverted") or experiment.of(family="metrics", verdict=name)
    ]
    return f"Of {experiment.count(family='metrics')} cells (metric and layer): {_listed(parts)}."


def _best(experiment: Experiment) -> str:
    sentences = []
    for verdict in ("valid", "inverted"):
        cells = experiment.of(family="metrics", verdict=verdict)
        if not cells:
            continue
        cells.sort(key=lambda row: -abs(row["d"]))
        named = [
            f"<code>{escape(row['metric'])}</code> at M{row.html('layer')} (d&nbsp;{row.html('d', link=row.anchor)})"
            for row in cells[:_MOST_NAMED]
        ]
        first = "" if len(cells) <= _MOST_NAMED else ", the largest of them"
        sentences.append(f"{verdict.capitalize()}{first}: {_listed(named)}.")
    if not experiment.of(family="metrics", verdict="valid") and experiment.of(family="metrics"):
        sentences.insert(0, "<b>No metric is valid at any layer.</b>")
    return " ".join(sentences)


def _positive_control(experiment: Experiment) -> str:
    cells = experiment.of(family="control", metric=POSITIVE_CONTROL)
    name = f"<code>{POSITIVE_CONTROL}</code>"
    if not cells:
        return f"There is no positive control ({name}) here, so whether this could have seen an effect is not shown."
    valid = [row for row in cells if row["verdict"] == "valid"]
    if not valid:
        return (
            f'<b class="bad">The positive control, {name}, is not seen at any layer: so this protocol had no power '
            f"here, and what it does not find may be there.</b>"
        )
    low, high = min(valid, key=lambda row: row["d"]), max(valid, key=lambda row: row["d"])
    seen = {"family": "control", "metric": POSITIVE_CONTROL}
    said = (
        f"The positive control, {name}, is valid at {experiment.count(**seen, verdict='valid')} of "
        f"{experiment.count(**seen)} layers (d&nbsp;{low.html('d')} to {high.html('d')})"
    )
    missed = [row for row in cells if row["verdict"] != "valid"]
    if missed:
        at = _listed([f"M{row.html('layer')}" for row in missed])
        return f'{said}; <b class="bad">not at {at}, where this protocol had no power.</b>'
    return f"{said}: the protocol sees an effect where there is one."


def _others(experiment: Experiment) -> str:
    sentences = []
    for family, name in experiment.metrics:
        if family == "control" and name != POSITIVE_CONTROL:
            of = {"family": family, "metric": name}
            sentences.append(
                f"The control <code>{escape(name)}</code> is valid at {experiment.count(**of, verdict='valid')} of "
                f"{experiment.count(**of)} layers."
            )
    baseline = {"family": "metrics", "metric": BASELINE}
    if experiment.of(**baseline):
        found = [row for row in experiment.of(**baseline) if row["verdict"] in ("valid", "inverted")]
        at = _listed([f"M{row.html('layer')}" for row in found])
        sentences.append(
            f"The baseline <code>{BASELINE}</code>, an order of experts drawn by chance, is "
            + (
                f"valid or inverted at {at}: by chance an order may be."
                if found
                else "neither valid nor inverted anywhere."
            )
        )
    return " ".join(sentences)


def verdict_counts(rows: Iterable[Row]) -> dict[str, int]:
    """How many rows have each verdict, in the order of `VERDICTS`; only those that there are."""
    verdicts = [row["verdict"] for row in rows]
    return {name: verdicts.count(name) for name in VERDICTS if name in verdicts}


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""
