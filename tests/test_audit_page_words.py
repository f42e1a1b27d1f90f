"""What an audit's page says beside its numbers: the noise floor, families of tests, verdicts; and what is open."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from moe_lens.audit import Audit, audit, census
from moe_lens.audit.audit_tables import AuditTables
from moe_lens.audit.noise import NoiseFloor
from moe_lens.audit_page import audit_page_html, audit_section, audit_text
from moe_lens.audit_page.tables import MEANINGS
from tests.audit_cases import made_audit, made_model_audit
from tests.families import prompts

FLOOR = {
    "n_samples": 1234,
    "n_routed_otherwise": 2,
    "median_effect": 0.0312,
    "replay_error": 0.0045,
    "replay_error_without_null": 0.01,
    "hooked_error": 0.0041,
    "null_error": 0.002,
}


def tables_of(*audits: Audit) -> AuditTables:
    return AuditTables.of([made_model_audit("m", audits=audits)])


def with_census(of: Audit, **facts: Any) -> Audit:
    return Audit(of.cells, {**of.provenance, "census": {**of.provenance["census"], **facts}})


def said(tables: AuditTables) -> str:
    """The page's text with single spaces, and the terminal's."""
    return " ".join(unescape(re.sub(r"<[^>]*>", "", audit_section(tables))).split())


# ---- the noise floor ----


@pytest.mark.parametrize(("replay_error", "met"), [(0.0045, True), (0.00615, True), (0.0062, False)])
def test_the_noise_floor_is_said_with_its_criterion(replay_error: float, met: bool) -> None:
    """1.5 times 0.0041 is 0.00615."""
    floor = {**FLOOR, "replay_error": replay_error}
    tables = tables_of(made_audit([0]), with_census(made_audit([0], scope="sequence"), noise_floor=floor))
    assert tables.noise_criterion_met == met
    for text in (said(tables), " ".join(audit_text(tables).split())):
        (line,) = re.findall(r"Noise floor, bfloat16: .*? order is noise\.", text)
        shown = f"{replay_error:.2g}"
        assert "changes by 0.031 nats (median of 1,234 sampled ablations)" in line
        assert f"off by {shown} (median, from float32), full forward passes with hooks by 0.0041" in line
        assert (
            "at most 1.5 times that, so the criterion of exactness is met" in line
            if met
            else "more than 1.5 times that, so the criterion of exactness is NOT met" in line
        )
        assert f"below {shown} nats" in line
    assert ('<p class="bad">Noise floor' in audit_section(tables)) == (not met)
    assert max(map(len, audit_text(tables).splitlines())) <= 110


def test_float32_has_no_noise_floor_and_half_precision_says_when_it_lacks_one() -> None:
    full = tables_of(with_census(made_audit([0]), dtype="float32", noise_floor=None))
    half = tables_of(with_census(made_audit([0]), dtype="float16", noise_floor=None))
    assert full.noise_criterion_met
    assert half.noise_criterion_met
    for tables, there in ((full, False), (half, True)):
        for text in (said(tables), audit_text(tables)):
            assert ("Noise floor: not measured, although the census is in float16." in text) == there
            assert ("oise floor" in text) == there


def test_a_noise_floor_of_nothing_is_not_met(tmp_path: Path) -> None:
    nan = float("nan")
    floor = {name: nan for name in FLOOR} | {"n_samples": 0, "n_routed_otherwise": 4}
    made = tables_of(with_census(made_audit([0]), noise_floor=floor))
    for tables in (made, AuditTables.load(made.save(tmp_path))):
        assert not tables.noise_criterion_met
        for text in (said(tables), " ".join(audit_text(tables).split())):
            assert "none of 4 sampled ablations could be compared with float32" in text
            assert "NOT met" in text
            assert "nan" not in text.lower().split("metrics:")[0].partition("noise floor")[2]


def test_one_census_that_fails_is_enough() -> None:
    good, bad = (with_census(made_audit([0]), noise_floor={**FLOOR, "replay_error": e}) for e in (0.001, 0.1))
    models = [made_model_audit("a", audits=[good]), made_model_audit("b", audits=[good, bad])]
    assert AuditTables.of(models[:1]).noise_criterion_met
    assert not AuditTables.of(models).noise_criterion_met
    failed = made_model_audit("c", passed=False)
    assert AuditTables.of([models[0], failed]).noise_criterion_met


def test_a_census_hands_its_noise_floor_on(hooked: Callable[[str], Any]) -> None:
    model = copy.deepcopy(hooked("olmoe")).to(torch.bfloat16)
    made = census(model, prompts(batch=4, length=12)[0], predictors=["first_order"], noise_samples=6)
    tables = tables_of(audit(made, None))
    floor = NoiseFloor.in_facts(made.facts)
    assert floor is not None
    assert tables.noise_criterion_met == floor.meets_criterion
    assert f"{floor.n_samples} sampled ablations" in said(tables)
    assert f"below {floor.replay_error:.2g} nats" in said(tables)


# ---- families of tests, and verdicts ----


def with_family(cells: pd.DataFrame, metrics: int, control: int) -> pd.DataFrame:
    return cells.assign(n_family=cells["family"].map({"metrics": metrics, "control": control}))


def test_how_many_cells_were_corrected_for_stands_at_the_grid() -> None:
    made = made_audit([0, 1])
    both = Audit(with_family(made.cells, 144, 8), made.provenance)
    html = audit_section(tables_of(both))
    after_grid = html[html.index('<table class="grid">') :]
    assert "Corrected within 144 cells of the metrics, and within 8 cells of each control." in said(
        tables_of(both)
    )
    line = re.search(
        r'<p class="note">Intervals: 95%, each cell alone. p: after Holm. Corrected within.*?</p>', after_grid
    )
    assert line is not None
    assert re.findall(r'data-row="audit:(\d+)" data-column="n_family"', line[0]) == ["0", str(2 * 4)]
    one = both.cells[both.cells["metric"] != "first_order"]
    assert "within 144 cells of the metrics, and within 8 cells of the control." in said(
        tables_of(Audit(one, made.provenance))
    )
    alone = both.cells[both.cells["metric"] == "first_order"].assign(n_family=1)
    assert "Corrected within 1 cell of the control." in said(tables_of(Audit(alone, made.provenance)))


def test_equivalence_is_said_to_be_uncorrected_and_how_much_of_it_remains() -> None:
    made = made_audit([0, 1])
    cells = made.cells
    of_metrics = cells.index[cells["family"] == "metrics"]
    assert "not corrected; after Holm" not in said(tables_of(made))
    cells.loc[of_metrics[:3], "verdict"] = "equivalent"
    cells["p_tost_holm"] = 0.06
    cells.loc[of_metrics[1:5], "p_tost_holm"] = 0.05
    text = said(tables_of(made))
    assert (
        "not corrected; after Holm too (p_tost_holm) 2 of the 3 equivalent cells of metrics would be." in text
    )


def test_verdicts_are_explained() -> None:
    text = said(tables_of(made_audit([0])))
    for meaning in MEANINGS.values():
        assert meaning in text
    assert "too few documents for the rank test" in MEANINGS["inconclusive"]
    assert "skewed" in MEANINGS["disagreement"]
    for word in ("may still differ from zero", "uncorrected", "pruning gain"):
        assert word in MEANINGS["equivalent"]


# ---- what is open ----


def test_rows_are_open_on_the_audits_own_page_unless_they_are_many() -> None:
    few, many = made_audit(range(50)), made_audit(range(51), scope="sequence")
    few = replace(few, cells=few.cells[few.cells["metric"].isin(few.cells["metric"].unique()[:6])])
    assert len(few.cells) == 300
    exactly = made_audit(range(50), metrics=[f"metric{i}" for i in range(6)], how="mean")
    assert len(exactly.cells) == 400
    many = made_audit([*range(50), 99], metrics=[f"metric{i}" for i in range(6)], scope="sequence")
    assert len(many.cells) > 400
    tables = tables_of(few, exactly, many)
    opened = re.findall(r'<details class="all"( open)?>', audit_page_html(tables))
    assert opened == [" open", " open", ""]
    assert re.findall(r'<details class="all"( open)?>', audit_section(tables)) == ["", "", ""]
