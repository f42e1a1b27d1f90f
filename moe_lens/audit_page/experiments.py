"""The experiments of an audit's tables, and what was done in them in words, as HTML.

An experiment is one way of ablating one model's experts (scope and how), with one set of definitions of the metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any, cast

import pandas as pd

from moe_lens.audit.audit_tables import AuditTables
from moe_lens.audit.paired_tests import SMALLEST_EFFECT
from moe_lens.audit.signed_rank import EXACT_BELOW
from moe_lens.audit_page.numbers import Row, at_most, count_html, has, rows_of

VERDICTS = ("valid", "inverted", "disagreement", "equivalent", "inconclusive")
"""In the order in which they are told."""
POSITIVE_CONTROL, BASELINE = "first_order", "random"

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

    @property
    def alpha(self) -> float:
        """Of its verdicts."""
        return float(self.settings.get("alpha", 0.05))

    @property
    def smallest_effect(self) -> float:
        """|d| below which `equivalent` is."""
        return float(self.settings.get("smallest_effect", SMALLEST_EFFECT))

    @property
    def by_both_tests(self) -> dict[str, Any]:
        """What the rows have of which t and signed ranks are both significant after correction."""
        return {"p_t_holm": at_most(self.alpha), "p_wilcoxon_holm": at_most(self.alpha)}

    def of(self, **values: Any) -> list[Row]:
        """Its rows that have these values."""
        return [row for row in self.rows if all(has(row, name, value) for name, value in values.items())]

    def ranks_are_silent(self, row: Row) -> bool:
        """Whether so few documents cannot have a signed-rank p that survives correction; see
        `moe_lens.audit.corrections.verdict`."""
        n_documents = int(row["n_documents"])
        return n_documents < EXACT_BELOW and row["n_family"] * 2.0 ** (1 - n_documents) > self.alpha

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
    of = f"{counted(metrics, 'metric')} and {counted(families.count('control'), 'control')}"
    layers = experiment.layers
    said = (
        f"{HOW.get(experiment.how, escape(experiment.how))} {SCOPES.get(experiment.scope, escape(experiment.scope))}. "
        f"{of} at {counted(len(layers), 'layer')}, {positions}."
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


def verdict_counts(rows: Iterable[Row]) -> dict[str, int]:
    """How many rows have each verdict, in the order of `VERDICTS`; only those that there are."""
    verdicts = [row["verdict"] for row in rows]
    return {name: verdicts.count(name) for name in VERDICTS if name in verdicts}


def counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"
