"""The page of an audit: every number on it is one of a saved table, and a model that is not verified has none."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_lens.audit.audit_result import Audit
from moe_lens.audit.audit_settings import AuditSettings
from moe_lens.audit.audit_tables import TABLES, AuditTables
from moe_lens.audit.model_audit import ModelAudit, audit_model
from moe_lens.audit.published import CONTRADICTIONS
from moe_lens.audit_page import AUDIT_CSS, audit_page_html, audit_section, audit_text, write_audit_page
from moe_lens.audit_page.numbers import Row, number_shown
from tests.families import prompts

METRICS = ("utilization_rate", "activation_norm", "mean_routing_weight", "activation_std", "random")
VOID = {"meta", "input", "br", "link", "img"}
HOSTILE = "<script>alert(1)</script> \"q\" & 'x'"


# ---- a page, read ----


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    above: Element | None
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()

    @property
    def traced(self) -> bool:
        return "data-row" in self.attributes or "data-count" in self.attributes

    def all(self, tag: str = "", **attributes: str) -> list[Element]:
        found = []
        for child in self.children:
            if isinstance(child, Element):
                fits = not tag or child.tag == tag
                if fits and all(child.attributes.get(name) == value for name, value in attributes.items()):
                    found.append(child)
                found += child.all(tag, **attributes)
        return found

    def within(self, tag: str, css: str = "") -> bool:
        above = self.above
        while above is not None:
            if above.tag == tag and (not css or css in above.classes):
                return True
            above = above.above
        return False

    def untraced_text(self) -> str:
        """What no traced element below holds."""
        parts = []
        for child in self.children:
            if isinstance(child, str):
                parts.append(child)
            elif not child.traced:
                parts.append(child.untraced_text())
        return "".join(parts)


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = self.at = Element("", {}, None)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, self.at)
        self.at.children.append(element)
        if tag not in VOID:
            self.at = element

    def handle_endtag(self, tag: str) -> None:
        assert self.at.tag == tag, f"</{tag}> closes <{self.at.tag}>"
        assert self.at.above is not None
        self.at = self.at.above

    def handle_data(self, data: str) -> None:
        self.at.children.append(data)


def read(html: str) -> Element:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.at is reader.root, f"<{reader.at.tag}> is not closed"
    return reader.root


# ---- tables ----


def renamed(found: ModelAudit, label: str, model: str, model_type: str = "olmoe") -> ModelAudit:
    return replace(found, label=label, model=model, model_type=model_type)


def failed(found: ModelAudit, label: str, which: int = 1) -> ModelAudit:
    checks = list(found.verification.checks)
    checks[which] = replace(checks[which], value=0.3125)
    return ModelAudit(label, label, "olmoe", replace(found.verification, checks=tuple(checks)))


def with_cells(found: ModelAudit, change: Callable[[pd.DataFrame], None]) -> ModelAudit:
    """The first audit alone, changed."""
    cells = found.audits[0].cells.copy()
    change(cells)
    return replace(found, audits=(Audit(cells, found.audits[0].provenance),))


@pytest.fixture(scope="module")
def found(hooked: Callable[[str], Any], hf: Callable[[str], Any]) -> ModelAudit:
    tokens, mask = prompts(batch=12, length=24)
    settings = AuditSettings(
        scopes=("token", "sequence"),
        positions=60,
        progressive_positions=30,
        metrics=METRICS,
        as_released=True,
    )
    batches = [(tokens[:6], mask[:6]), (tokens[6:], mask[6:])]
    audited = audit_model(hooked("olmoe"), hf("olmoe"), batches, settings=settings, label="tiny")
    assert audited.passed
    return audited


@pytest.fixture(scope="module")
def several(found: ModelAudit) -> AuditTables:
    """Two that have published numbers, one that failed, and one of a hostile name."""

    def hostile(cells: pd.DataFrame) -> None:
        cells.loc[cells["metric"] == "random", "metric"] = "<b onclick='x'>\"evil\"</b>"
        place = cells.index[1]
        cells.loc[place, "n_pairs"] = 1
        cells.loc[place, ["d", "d_low", "d_high", "p_t_holm", "p_wilcoxon_holm", "t"]] = np.nan
        cells.loc[place, "verdict"] = "inconclusive"
        cells.loc[cells.index[2], ["p_t_holm", "bayes_factor"]] = [0.0, np.inf]
        cells.loc[cells.index[3], "verdict"] = "inverted"
        cells.loc[cells.index[4], "verdict"] = "valid"

    return AuditTables.of(
        [
            renamed(found, "OLMoE", "allenai/OLMoE-1B-7B-0924"),
            failed(found, "broken"),
            renamed(found, "Qwen", "Qwen/Qwen1.5-MoE-A2.7B", "qwen2_moe"),
            with_cells(renamed(found, HOSTILE, "<img src=x onerror=alert(2)>"), hostile),
        ]
    )


@pytest.fixture(scope="module")
def html(several: AuditTables) -> str:
    return audit_page_html(several)


@pytest.fixture(scope="module")
def page(html: str) -> Element:
    return read(html)


@pytest.fixture(scope="module")
def saved(several: AuditTables, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    folder = several.save(tmp_path_factory.mktemp("tables"))
    return {name: pd.read_parquet(folder / f"{name}.parquet") for name in TABLES}


# ---- every number is of a row ----


def assert_shows(text: str, value: Any) -> None:
    """The text is the value, rounded to the digits that it has."""
    if isinstance(value, (bool, np.bool_)):
        assert text == ("yes" if value else "no")
        return
    if isinstance(value, str):
        assert text == value
        return
    if math.isnan(value):
        assert text == "–"
        return
    if math.isinf(value):
        assert text == "∞"
        return
    if text.startswith("<"):
        assert 0 <= value < float(text[1:])
        return
    match = re.fullmatch(r"([+−]?)(\d[\d,]*)(?:\.(\d+))?(?:e([+-]\d+))?", text)
    assert match, text
    sign, whole, decimals, exponent = match.groups()
    size = float(f"{whole.replace(',', '')}.{decimals or 0}e{exponent or 0}")
    step = 10.0 ** (int(exponent or 0) - len(decimals or ""))
    shown = -size if sign == "−" else size
    assert abs(shown - value) <= 0.5001 * step, (text, value)
    # Nothing that is there is shown as if it were not.
    assert value == 0 or size > 0 or decimals, (text, value)


def test_every_traced_element_shows_the_value_of_the_saved_row(
    page: Element, saved: dict[str, pd.DataFrame]
) -> None:
    seen: Counter[str] = Counter()
    for element in page.all():
        if "data-row" not in element.attributes:
            continue
        table, _, number = element.attributes["data-row"].partition(":")
        assert_shows(element.text, saved[table].at[int(number), element.attributes["data-column"]])
        seen[table] += 1
    assert set(seen) == set(TABLES)


def test_no_number_of_a_table_is_without_its_row(page: Element) -> None:
    cells = [cell for cell in page.all("td") if not cell.traced]
    assert len(cells) > 100
    for cell in cells:
        if cell.within("table", "contradictions"):
            continue
        assert not re.search(r"\d", re.sub(r"\bof \d+\b", "", cell.untraced_text())), cell.text
    for cell in page.all("td"):
        if "number" in cell.classes and not cell.traced:
            assert not re.search(r"\d", cell.untraced_text()), cell.text
            assert cell.text == "–" or cell.all() != []


def test_counts_are_those_of_the_saved_rows(page: Element, saved: dict[str, pd.DataFrame]) -> None:
    counts = [element for element in page.all() if "data-count" in element.attributes]
    assert len(counts) > 50
    seen_up_to = False
    for element in counts:
        frame = saved[element.attributes["data-count"]]
        for name, value in json.loads(element.attributes["data-where"]).items():
            up_to = isinstance(value, dict)
            frame = frame[frame[name] <= value["at most"]] if up_to else frame[frame[name] == value]
            seen_up_to |= up_to
        assert element.text == f"{len(frame):,}"
    assert seen_up_to


def test_every_row_has_its_line_and_begins_with_its_number(page: Element, several: AuditTables) -> None:
    ids = [element.attributes["id"] for element in page.all() if "id" in element.attributes]
    ids = [name for name in ids if re.fullmatch(r"[a-z]+-\d+", name)]
    wanted = [f"{name}-{i}" for name in TABLES[1:] for i in range(len(getattr(several, name)))]
    assert sorted(ids) == sorted(wanted)
    for element in page.all("tr"):
        if "id" in element.attributes:
            first = next(child for child in element.children if isinstance(child, Element))
            assert first.text == f"#{element.attributes['id'].rpartition('-')[2]}"
            own = {child.attributes["data-row"] for child in element.all() if "data-row" in child.attributes}
            assert own == {element.attributes["id"].replace("-", ":")}


def test_links_lead_to_lines(page: Element) -> None:
    ids = {element.attributes["id"] for element in page.all() if "id" in element.attributes}
    links = [element.attributes["href"] for element in page.all("a")]
    assert len(links) > 100
    assert {link[1:] for link in links} <= ids


def test_a_link_of_the_grid_leads_to_the_row_that_it_shows(page: Element) -> None:
    for grid in page.all("table", **{"class": "grid"}):
        for cell in grid.all("td"):
            row = cell.attributes["data-row"]
            assert cell.all("a")[0].attributes["href"] == f"#{row.replace(':', '-')}"


def test_the_grid_has_every_cell_at_its_place(page: Element, several: AuditTables) -> None:
    cells = several.audit
    seen = set()
    for grid in page.all("table", **{"class": "grid"}):
        head = [th.text for th in grid.all("thead")[0].all("th")][1:]
        for line in grid.all("tbody")[0].all("tr"):
            metric = line.all("th")[0].text
            for name, cell in zip(head, line.all("td"), strict=True):
                number = int(cell.attributes["data-row"].partition(":")[2])
                row = cells.loc[number]
                control = " control" if row["family"] == "control" else ""
                assert (metric, name) == (f"{row['metric']}{control}", f"M{row['layer']}")
                assert row["verdict"] in cell.classes
                seen.add(number)
    assert seen == set(range(len(cells)))


def test_what_is_beyond_d_stands_at_its_place_on_request(page: Element, several: AuditTables) -> None:
    seen: Counter[str] = Counter()
    for table in page.all("table", **{"class": "beyond"}):
        assert table.within("details")
        column, *layers = [th.text for th in table.all("thead")[0].all("th")]
        for line in table.all("tbody")[0].all("tr"):
            metric = line.all("th")[0].text.removesuffix(" control")
            for layer, cell in zip(layers, line.all("td"), strict=True):
                elements = [e for e in cell.all() if "data-row" in e.attributes]
                assert elements[0].attributes["data-column"] == column
                assert [e.attributes["data-column"] for e in elements[1:]] in (
                    [],
                    [f"{column}_standard_error"],
                )
                rows = {int(e.attributes["data-row"].partition(":")[2]) for e in elements}
                assert len(rows) == 1
                row = several.audit.loc[rows.pop()]
                assert (metric, layer) == (row["metric"], f"M{row['layer']}")
                seen[column] += 1
    n = len(several.audit)
    assert seen == {"pruning_gain": n, "log_odds": n, "spearman": n}


def test_metrics_that_claim_most_for_low_values_are_marked(found: ModelAudit) -> None:
    tables = AuditTables.of([found])
    assert "(low)" not in audit_section(tables)
    assert "(low)" not in audit_text(tables)

    def change(cells: pd.DataFrame) -> None:
        cells["higher_is_more_important"] = cells["metric"] != "random"

    tables = AuditTables.of([with_cells(found, change)])
    page, text = read(audit_section(tables)), audit_text(tables)
    heads = [th.text for th in page.all("table", **{"class": "grid"})[0].all("th", scope="row")]
    assert [name for name in heads if "(low)" in name] == ["random (low)"]
    marked = [td.text for td in page.all("td") if "(low)" in td.text]
    assert set(marked) == {"random (low)"}
    assert len(marked) >= found.audits[0].cells["layer"].nunique()
    assert "(low): ranked by low values" in words_of(tables)
    assert "\n(low): ranked by low values" in text
    assert "\nrandom (low) " in text
    assert text.count("\nactivation_norm ") == 1


def test_correlations_are_shown_with_interval_and_p(page: Element) -> None:
    cells = [
        td
        for table in page.all("table", **{"class": "chains"})
        for td in table.all("td", **{"class": "number"})
    ]
    several_values = [
        [e.attributes["data-column"] for e in td.all() if "data-row" in e.attributes] for td in cells
    ]
    shown = [columns for columns in several_values if columns]
    assert shown
    assert all(columns[0] == "rho" and columns[-1] == "p" for columns in shown)


def test_by_default_d_interval_holm_and_verdict_and_the_rest_on_request(
    page: Element, several: AuditTables
) -> None:
    tables = [
        table
        for table in page.all("table")
        if "rows" in table.classes and table.all("tr", id="audit-0") != []
    ]
    (table,) = tables
    assert table.within("details", "all")
    line = table.all("tr", id="audit-0")[0]
    of_cell: list[tuple[str, bool]] = []
    for cell in line.all("td"):
        more = "more" in cell.classes
        names = [cell, *cell.all()]
        of_cell += [(e.attributes["data-column"], more) for e in names if "data-column" in e.attributes]
    assert [name for name, more in of_cell if not more] == [
        "metric", "d", "d_low", "d_high", "p_t_holm", "p_wilcoxon_holm", "verdict",
    ]  # fmt: skip
    assert sorted(name for name, _ in of_cell) == sorted(several.audit.columns)
    hidden = [name for name, more in of_cell if more]
    assert hidden == [name for name in several.audit.columns if name in hidden]
    heads = table.all("thead")[0].all("th")
    assert [h.text for h in heads if "more" in h.classes] == hidden
    assert ".more { display: none; }" in AUDIT_CSS


# ---- verification ----


def test_a_model_that_failed_has_no_result(several: AuditTables, page: Element) -> None:
    assert "broken" not in set(several.audit["label"])
    text = "".join(element.text for element in page.all("main"))
    assert "broken failed verification" in text
    before, _, after = text.partition("The audit")
    results, _, provenance = after.partition("What this is of")
    assert "broken" in before
    assert "broken" not in results
    assert "broken" in provenance


def test_verification_stands_before_every_result(several: AuditTables, html: str) -> None:
    results = html.index("<h2>The audit</h2>")
    assert html.index('class="verification"') < results
    assert results < html.index("<table", html.index("</table>"))
    for number in range(len(several.verification)):
        assert f'data-row="verification:{number}"' in html[:results]


def test_where_all_failed_there_is_nothing_but_verification(found: ModelAudit) -> None:
    nothing_run = failed(found, "first", 0)
    verification = replace(nothing_run.verification, checks=nothing_run.verification.checks[:1])
    tables = AuditTables.of([replace(nothing_run, verification=verification), failed(found, "second")])
    html = audit_page_html(tables)
    page = read(html)
    assert {e.attributes["data-row"].split(":")[0] for e in page.all() if "data-row" in e.attributes} == {
        "verification"
    }
    assert [h.text for h in page.all("h2")] == ["Is this the model?"]
    assert "plotly" not in html.lower()
    assert len(page.all("table")) == 1
    assert html.count("failed: ") == 2
    assert "No model passed" in audit_section(tables)
    text = audit_text(tables)
    assert text.count("FAILED") == 2
    assert "0.312" in text
    assert "M0" not in text


# ---- the answer in words ----


def words_of(tables: AuditTables) -> str:
    return " ".join(" ".join(p.text for p in read(audit_section(tables)).all("p")).split())


def test_the_answer_counts_verdicts_and_names_the_valid(found: ModelAudit) -> None:
    def change(cells: pd.DataFrame) -> None:
        of_metrics = cells.index[cells["family"] == "metrics"]
        cells.loc[of_metrics, ["verdict", "p_t_holm", "p_wilcoxon_holm"]] = ["equivalent", 0.06, 0.06]
        # Both, one test, and both of a cell that is not equivalent.
        cells.loc[of_metrics[6:8], ["p_t_holm", "p_wilcoxon_holm"]] = [0.05, 0.001]
        cells.loc[of_metrics[8], ["p_t_holm", "p_wilcoxon_holm"]] = [0.05, 0.051]
        cells.loc[of_metrics[2], ["p_t_holm", "p_wilcoxon_holm"]] = [0.001, 0.001]
        cells.loc[of_metrics[2], ["verdict", "d"]] = ["valid", 0.4321]
        cells.loc[of_metrics[3:5], "verdict"] = "disagreement"

    one = with_cells(found, change)
    cells = one.audits[0].cells
    n = int((cells["family"] == "metrics").sum())
    row = cells[cells["family"] == "metrics"].iloc[2]
    words = words_of(AuditTables.of([one]))
    assert f"Of {n} cells (metric and layer): 1 valid, 0 inverted, 2 where the two tests disagree" in words
    differ = "2 of them still differ from zero by both tests"
    assert f"{n - 3} of which |d| is shown to be below 0.1 ({differ})." in words
    assert f"{n - 3} equivalent (2 of them significant by both tests)" in audit_text(AuditTables.of([one]))
    html = audit_page_html(AuditTables.of([one]))
    listed = html[html.index("equivalent, though both tests are significant") :]
    listed = listed[: listed.index("<details")]
    of = cells.index[cells["family"] == "metrics"]
    rows = re.findall(r'data-row="audit:(\d+)" data-column="metric"', listed)
    assert [int(row) for row in rows] == list(of[6:8])
    assert f"Valid: {row['metric']} at M{row['layer']} (d +0.432)." in words
    assert "No metric is shown" not in words

    none = with_cells(found, lambda frame: frame.__setitem__("verdict", "equivalent"))
    assert "<b>No metric is shown to be valid at any layer.</b>" in audit_section(AuditTables.of([none]))


def test_cells_that_show_nothing_are_no_evidence_of_absence(found: ModelAudit) -> None:
    def change(cells: pd.DataFrame) -> None:
        of_metrics = cells.index[cells["family"] == "metrics"]
        cells.loc[of_metrics, "verdict"] = "equivalent"
        cells.loc[of_metrics[:3], "verdict"] = "inconclusive"
        cells.loc[of_metrics[:3], "detectable_d"] = [0.5, 0.14, 0.1]

    tables = AuditTables.of([with_cells(found, change)])
    n = int((tables.audit["family"] == "metrics").sum())
    words = words_of(tables)
    assert f"at any layer; 3 of {n} cells are inconclusive, which is no evidence of absence" in words
    assert "show |d| from about 0.140 on" in words
    assert "<b>No metric is shown" not in audit_section(tables)


@pytest.mark.parametrize("n_documents", [4, 6, 12])
def test_too_few_documents_for_ranks_are_said_before_any_verdict(found: ModelAudit, n_documents: int) -> None:
    def change(cells: pd.DataFrame) -> None:
        cells[["n_documents", "n_family"]] = [n_documents, 36]

    tables = AuditTables.of([with_cells(found, change)])
    silent = (
        "With 6 documents the signed-rank test cannot reach 0.05 in a family of 36: no cell can be valid."
    )
    words, text = words_of(tables), audit_text(tables)
    for said in (words, " ".join(text.split())):
        assert (silent in said) == (n_documents == 6)
        assert ("With under 5 documents (4 here) every cell is inconclusive." in said) == (n_documents == 4)
    if n_documents == 6:
        assert words.index(silent) < words.index("valid, 0 inverted")
        assert text.index("With 6 documents") < text.index("metrics: ")


def test_a_positive_control_apart_from_zero_is_seen_though_not_valid(found: ModelAudit) -> None:
    def change(cells: pd.DataFrame) -> None:
        cells["n_documents"] = 6
        control = cells.index[cells["metric"] == "first_order"]
        cells.loc[control, ["verdict", "d_low", "d_high", "n_family"]] = ["inconclusive", 0.2, 0.9, 5]
        cells.loc[control, ["p_t_holm", "p_wilcoxon_holm"]] = [0.01, 0.16]

    tables = AuditTables.of([with_cells(found, change)])
    words, text = words_of(tables), " ".join(audit_text(tables).split())
    assert "had no power" not in words + text
    assert "NOT SEEN" not in text
    assert "is valid at 0 of" in words
    assert "t: significant; ranks: cannot be" in words
    assert "is not `valid` at any layer: M0, " in text
    assert "(t: significant; ranks: cannot be)" in text


def test_the_fixed_order_is_no_null(found: ModelAudit) -> None:
    def change(cells: pd.DataFrame) -> None:
        rows = cells.index[cells["metric"] == "random"]
        cells.loc[rows, ["p_t_holm", "p_wilcoxon_holm", "verdict", "d"]] = [0.5, 0.5, "equivalent", 0.01]
        cells.loc[rows[1], ["p_wilcoxon_holm", "d"]] = [0.04, 0.0321]

    words = words_of(AuditTables.of([with_cells(found, change)]))
    layer = sorted(found.audits[0].cells["layer"].unique())[1]
    assert "it is no null" in words
    assert f"A test finds something of it at M{layer} (d +0.032, equivalent)." in words


def test_cards_count_one_experiment_of_each_model(page: Element, several: AuditTables) -> None:
    own = several.audit.query("scope == 'token' and as_released == '' and family == 'metrics'")
    (card,) = [e for e in page.all("div", **{"class": "card"}) if "cells of metrics are valid" in e.text]
    shown = [int(e.text) for e in card.all("span") if e.traced]
    assert shown == [int((own["verdict"] == "valid").sum()), len(own)]
    assert "(token scope, own definitions, 3 experiments)" in card.text


def test_counts_of_a_layer_are_of_metrics_and_controls_are_named(found: ModelAudit) -> None:
    def change(cells: pd.DataFrame) -> None:
        cells["verdict"] = "equivalent"
        cells.loc[cells["family"] == "control", "verdict"] = "valid"

    page = read(audit_section(AuditTables.of([with_cells(found, change)])))
    heads = [h.text for h in page.all("h4") if h.text.startswith("Layer ")]
    assert len(heads) == found.audits[0].cells["layer"].nunique()
    for head in heads:
        n = len(METRICS)
        assert head.endswith(f"metrics: {n} equivalent; controls: routing_weight valid, first_order valid")


@pytest.mark.parametrize("seen", ["everywhere", "in part", "nowhere", "not there"])
def test_a_protocol_without_power_is_said_to_be_one(found: ModelAudit, seen: str) -> None:
    def change(cells: pd.DataFrame) -> None:
        control = cells.index[cells["metric"] == "first_order"]
        cells.loc[control, ["d_low", "d_high"]] = [-0.1, 0.9]
        cells.loc[control, "verdict"] = "valid" if seen != "nowhere" else "inconclusive"
        if seen == "in part":
            cells.loc[control[-1], "verdict"] = "inconclusive"
        if seen == "not there":
            cells.loc[control, "metric"] = "another"

    tables = AuditTables.of([with_cells(found, change)])
    words, text = words_of(tables), audit_text(tables)
    assert ("had no power here" in words) == (seen == "nowhere")
    assert ("NOT SEEN" in text) == (seen == "nowhere")
    assert ("zero and this protocol had no power" in words) == (seen == "in part")
    assert ("There is no positive control" in words) == (seen == "not there")
    assert ("no positive control" in text) == (seen == "not there")
    assert ("effects of this size are seen; of smaller ones see" in words) == (seen == "everywhere")


def test_every_experiment_is_said_and_two_of_a_kind_are_two(found: ModelAudit) -> None:
    twice = replace(found, audits=(*found.audits, found.audits[0]))
    tables = AuditTables.of([twice])
    page = read(audit_page_html(tables))
    done = [item.text for item in page.all("ul")[0].all("li")]
    assert len(done) == len(twice.audits) == 5
    assert [text.partition(":")[0] for text in done] == [
        "tiny, token scope",
        "tiny, token scope, metrics as released for olmoe",
        "tiny, sequence scope",
        "tiny, sequence scope, metrics as released for olmoe",
        "tiny, token scope, number 2",
    ]
    ids = [element.attributes["id"] for element in page.all("tr") if "id" in element.attributes]
    assert sum(name.startswith("audit-") for name in ids) == len(tables.audit)
    assert "wherever it is active" in done[2]
    assert "at one token, and" in done[0]


# ---- beside the published audit ----


def test_published_numbers_stand_beside_ours(page: Element, several: AuditTables) -> None:
    shown = Counter(
        (element.attributes["data-row"], element.attributes["data-column"])
        for table in page.all("table", **{"class": "beside"})
        for element in table.all("td")
        if "data-row" in element.attributes
    )
    of_ours = several.published["ours_row"] != ""
    assert of_ours.any()
    assert (~of_ours).any()
    for number in several.published.index[of_ours]:
        assert shown[(f"published:{number}", "ours")] == 1
    published = {row for row, column in shown if column == "published"}
    key = ["label", "table", "metric", "layer", "removed", "quantity"]
    assert len(published) == len(several.published[key].drop_duplicates())


def sides_of(page: Element, title: str, after: str) -> dict[str, dict[str, Element]]:
    """What is said under the first such table below a heading: by thing, then by side."""
    elements = page.all()
    start = next(i for i, e in enumerate(elements) if e.tag == "h3" and e.text == after)
    start = next(
        i for i in range(start, len(elements)) if elements[i].tag == "h4" and title in elements[i].text
    )
    details = next(e for e in elements[start:] if "sides" in e.classes)
    heads = [th.text for th in details.all("thead")[0].all("th")][1:]
    return {
        line.all("th")[0].text: dict(zip(heads, line.all("td"), strict=True))
        for line in details.all("tbody")[0].all("tr")
    }


def test_what_each_side_is_is_said_once(found: ModelAudit) -> None:
    def tied(cells: pd.DataFrame) -> None:
        cells["n_ties"] = np.arange(len(cells)) % 7
        cells["n_pairs"] = cells["n_positions"] - cells["n_ties"]

    several = AuditTables.of([with_cells(renamed(found, "OLMoE", "allenai/OLMoE-1B-7B-0924"), tied)])
    page = read(audit_page_html(several))
    sides = sides_of(page, "Table 1:", "OLMoE")
    assert list(sides) == ["definition", "statistic", "scope", "sampling", "corpus"]
    assert list(sides["scope"])[:2] == ["paper", "ours, token scope"]
    ours = "ours, token scope"
    census = found.audits[0].provenance["census"]
    assert sides["corpus"][ours].text == f"{census['corpus']}; {census['dtype']}"
    assert "WikiText-2" in sides["corpus"]["paper"].text
    assert sides["statistic"]["paper"].text.count("ddof 0") == 1
    assert "ddof 1" in sides["statistic"][ours].text
    for metric in METRICS[:4]:
        assert sides["definition"]["paper"].text.count(f"{metric}: ") == 1
    # Of ours, the samplings with the fewest and the most positions, as they are in their rows.
    rows = several.published.query("table == 1 and ours_scope == 'token, zero'")
    numbers = rows["ours_n"]
    assert numbers.nunique() > 1
    few, many = (set(rows.loc[numbers == n, "ours_sampling"]) for n in (numbers.min(), numbers.max()))
    low, high = sides["sampling"][ours].text.split("to ", 1)
    assert low in few
    assert high in many
    # Every other is where its number is.
    titles = {
        e.attributes["data-row"]: e.attributes["title"]
        for table in page.all("table", **{"class": "beside"})
        for e in table.all("td", **{"data-column": "ours"})
    }
    for number, row in rows.iterrows():
        assert titles[f"published:{number}"] == f"row {row['ours_row']}: {row['ours_sampling']}"


def test_why_there_is_no_number_of_ours(found: ModelAudit) -> None:
    one = renamed(found, "OLMoE", "allenai/OLMoE-1B-7B-0924")
    of = found.audits[0].provenance
    of = {**of, "settings": {**of["settings"], "compare": 2}}
    tables = AuditTables.of([replace(one, audits=(Audit(found.audits[0].cells, of),))])
    (why,) = set(tables.published.query("table == 1")["ours_definition"]) - {""}
    page = read(audit_page_html(tables))
    said = [p for p in page.all("p") if p.text == why]
    assert len(said) == 2  # tables 1 and 4
    assert not any(p.within("details") for p in said)
    beside = page.all("table", **{"class": "beside"})[0]
    dashes = beside.all("td", **{"data-column": "ours"})
    assert {e.text for e in dashes} == {"–"}
    assert why in {e.attributes["title"] for e in dashes}
    assert "no number of ours: our audit compares" in audit_text(tables)


def test_lines_without_a_number_of_ours_are_folded(page: Element, several: AuditTables) -> None:
    folded = 0
    for table in page.all("table", **{"class": "beside"}):
        for line in table.all("tbody")[0].all("tr"):
            ours = {
                several.published.at[int(e.attributes["data-row"].partition(":")[2]), "ours_row"]
                for e in line.all("td", **{"data-column": "ours"})
            }
            assert table.within("details") == (ours <= {""})
            folded += table.within("details")
    assert folded
    (first,) = [d for d in page.all("details") if "without a number of ours" in d.text][:1]
    n = int(first.all("summary")[0].text.split()[0])
    assert n == len(first.all("tbody")[0].all("tr"))
    assert "of the paper without one of ours: see published.parquet" in audit_text(several)


def test_contradictions_have_both_sides(page: Element) -> None:
    tables = page.all("table", **{"class": "contradictions"})
    text = " ".join(table.text for table in tables)
    assert len(tables) == 2
    for one in CONTRADICTIONS:
        assert one.said in text
    # Both sides of what is wrong between tables, whichever model was audited.
    for table in tables:
        (rule,) = [tr for tr in table.all("tr") if "any cell where t and Wilcoxon disagree" in tr.text]
        lines = table.all("tr")
        next_one = lines[lines.index(rule) + 1]
        assert "table 2: the metrics, Qwen1.5-MoE" in rule.text
        assert "table 4: the control, OLMoE" in next_one.text
        assert [th.text for th in table.all("thead")[0].all("th")][-1] == "why"
    assert "(0.17)" in text
    assert "+0.222" in text


def test_without_published_numbers_nothing_is_beside(found: ModelAudit) -> None:
    tables = AuditTables.of([found])
    assert tables.published.empty
    assert "Beside the published" not in audit_page_html(tables)
    assert "beside" not in audit_text(tables)


# ---- text from outside ----


def test_what_comes_from_outside_is_text(page: Element, several: AuditTables) -> None:
    for element in page.all():
        assert not any(name.startswith("on") for name in element.attributes)
        assert element.tag not in ("img", "iframe")
    for script in page.all("script"):
        assert "alert(1)</" not in script.text
    assert HOSTILE in "".join(item.text for item in page.all("h3"))
    plain = read(audit_page_html(replace_labels(several))).all("script")
    assert len(page.all("script")) == len(plain)


def replace_labels(tables: AuditTables) -> AuditTables:
    """The same, with an innocent name."""

    def named(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(label=frame["label"].replace(HOSTILE, "innocent"))

    provenance = tuple(
        {**one, "label": "innocent" if one["label"] == HOSTILE else one["label"]} for one in tables.provenance
    )
    return AuditTables(**{name: named(getattr(tables, name)) for name in TABLES}, provenance=provenance)


def test_provenance_is_escaped_and_there(found: ModelAudit) -> None:
    evil = "</dd><script>alert(3)</script>"
    of = dict(found.audits[0].provenance)
    of["census"] = {**of["census"], "corpus": evil, "documents": [evil]}
    one = replace(found, audits=(Audit(found.audits[0].cells, of),))
    html = audit_page_html(AuditTables.of([one]))
    assert evil not in html
    texts = [dd.text for dd in read(html).all("dd")]
    assert evil in texts
    assert found.audits[0].provenance["weights"] in texts


# ---- numbers as text ----


@pytest.mark.parametrize(
    ("value", "column", "text"),
    [
        (-0.0714, "d", "−0.071"),
        (0.1, "d_high", "+0.100"),
        (0.0119, "p_t", "0.012"),
        (0.00134, "p_t", "0.0013"),
        (0.0000134, "p_wilcoxon_holm", "1.3e-05"),
        (1.0, "p_t_holm", "1.000"),
        (0.0, "p_t_holm", "<1e-300"),
        (2.4e-5, "posterior", "2.4e-05"),
        (0.2, "p95", "+0.200"),
        (math.nan, "d", "–"),
        (math.inf, "bayes_factor", "∞"),
        (12277, "n_pairs", "12,277"),
        (623.44, "n_effective", "623.4"),
        (-0.00123456, "mean_difference", "−0.0012"),
        (-0.0000123, "mean_difference", "−1.2e-05"),
        (0.0, "value", "0"),
        (1.43e-6, "value", "1.43e-06"),
        (31, "layer", "31"),
        (True, "passed", "yes"),
        (np.float32(0.5), "gap_norm", "0.5000"),
    ],
)
def test_numbers_are_rounded_by_column(value: Any, column: str, text: str) -> None:
    assert number_shown(value, column) == text


def test_a_dash_says_why(page: Element) -> None:
    dashes = [e for e in page.all() if e.text == "–" and e.attributes.get("data-column") == "t"]
    assert dashes
    assert {e.attributes["title"] for e in dashes} == {"fewer than two pairs"}
    row = Row("audit", 3, {"rho": math.nan, "n_pairs": 50})
    assert "only the control routing_weight" in row.html("rho")
    below = [e for e in page.all() if e.text == "<1e-300"]
    assert below
    assert all(e.attributes["title"] for e in below)


# ---- as text, and as a part ----


def test_text_has_every_effect_and_fits_a_terminal(several: AuditTables) -> None:
    text = audit_text(several)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 110
    marks = {"valid": ">", "inverted": "<", "disagreement": "x", "equivalent": "=", "inconclusive": "?"}
    head = lines.index(next(line for line in lines if line.startswith("OLMoE, token scope:")))
    layers = lines[head + 2].split()
    first = several.audit[(several.audit["label"] == "OLMoE") & (several.audit["scope"] == "token")]
    first = first[first["as_released"] == ""]
    for line in lines[head + 3 : head + 3 + len(METRICS)]:
        metric, *cells = line.split()
        for layer, cell in zip(layers, cells, strict=True):
            row = first[(first["metric"] == metric) & (first["layer"] == int(layer[1:]))].iloc[0]
            assert cell == f"{row['d']:+.3f}{marks[row['verdict']]}"
    counts = first[first["family"] == "metrics"]["verdict"].value_counts()
    line = next(line for line in lines[head:] if line.startswith("metrics:"))
    for verdict, n in counts.items():
        assert f"{n} {verdict}" in line
    assert "table 1: the metrics, OLMoE" in text
    assert re.search(r"^utilization_rate +0 +d +-0\.071 +[+-]0\.\d{3}", text, re.MULTILINE)


def test_many_layers_come_in_blocks(found: ModelAudit) -> None:
    cells = found.audits[0].cells
    many = pd.concat([cells[cells["layer"] == 0].assign(layer=i) for i in range(30)], ignore_index=True)
    one = replace(
        found,
        audits=(Audit(many, found.audits[0].provenance),),
        progressive=None,
        redistribution=None,
    )
    text = audit_text(AuditTables.of([one]))
    assert max(map(len, text.splitlines())) <= 110
    for layer in range(30):
        assert len(re.findall(rf"\bM{layer}\b", text)) == 1
    html = audit_page_html(AuditTables.of([one]))
    assert "The heaviest experts together" not in html
    assert "the rest of the layer also writes" not in html


def test_the_section_is_a_part_of_a_page(found: ModelAudit) -> None:
    section = audit_section(AuditTables.of([found]))
    led, begins = audit_section(AuditTables.of([found]), lead=True), "<p><b>tiny, token scope.</b>"
    assert section.startswith(begins)
    lead = led.partition(begins)[0]
    assert "at one token, and the loss of the next token is read there" in lead
    assert re.search(r"positions in <span [^>]*>12</span> documents", lead)
    assert audit_page_html(AuditTables.of([found])).count('<p class="lead">At each position') == 1
    page = read(section)
    assert not [e for e in page.all() if e.tag in ("html", "body", "main", "h1", "h2")]
    assert len(page.all("table", **{"class": "grid"})) == len(found.audits)


def test_the_page_is_written_where_there_is_a_folder(found: ModelAudit, tmp_path: Path) -> None:
    tables = AuditTables.of([found])
    path = write_audit_page(tables, tmp_path / "audit.html")
    page = read(path.read_text(encoding="utf-8"))
    assert page.all("h1")[0].text == "Does any metric say which experts of tiny matter?"
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_audit_page(tables, tmp_path / "missing" / "audit.html")


def test_saved_tables_give_the_same(several: AuditTables, tmp_path: Path) -> None:
    loaded = AuditTables.load(several.save(tmp_path))
    assert audit_text(loaded) == audit_text(several)
    shown = [[e.text for e in read(audit_section(tables)).all() if e.traced] for tables in (several, loaded)]
    assert shown[0] == shown[1]
