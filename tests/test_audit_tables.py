"""The tables of an audit: every row of every model is there, once, under its label, and is read back as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from moe_lens.audit.audit_tables import TABLES, AuditTables
from moe_lens.audit.model_audit import ModelAudit
from moe_lens.audit.protocol_presets import AUDIT_PRESETS
from moe_lens.audit.published_beside import COLUMNS as PUBLISHED_COLUMNS
from tests.audit_cases import (
    made_audit,
    made_model_audit,
    made_progressive,
    made_redistribution,
)

LAYERS = (0, 1, 2)


def first() -> ModelAudit:
    """Two scopes with two sets of definitions each, and everything else."""
    return made_model_audit(
        "olmoe",
        audits=[
            made_audit(LAYERS, scope=scope, as_released=released)
            for scope in ("token", "sequence")
            for released in ("", "olmoe")
        ],
        progressive=made_progressive(LAYERS, 7),
        redistribution=made_redistribution(LAYERS),
    )


def second() -> ModelAudit:
    return made_model_audit(
        "qwen <b>",
        model_type="qwen2_moe",
        audits=[made_audit((0, 5), how="reroute", metrics=("random",), seed=1)],
        progressive=made_progressive((5,), 3, seed=1),
        redistribution=made_redistribution((0, 5), seed=1),
    )


def published_one() -> ModelAudit:
    """One that the published audit has, with other rows before it in every table."""
    layers = tuple(range(16))
    return made_model_audit(
        "third",
        model=AUDIT_PRESETS["olmoe"].model,
        audits=[made_audit(layers, seed=2), made_audit(layers, as_released="olmoe", seed=2)],
        progressive=made_progressive((0, 1, 7, 8, 9, 15), 7, seed=2),
    )


def assert_same(a: AuditTables, b: AuditTables) -> None:
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(a, name), getattr(b, name), check_exact=True)
    assert a.provenance == b.provenance


def test_rows_are_those_of_the_models_in_their_order() -> None:
    audits = [first(), second()]
    tables = AuditTables.of(audits)
    assert tables.labels == ("olmoe", "qwen <b>")
    assert tables.passed
    parts = {
        "verification": [one.verification.to_frame() for one in audits],
        "audit": [found.cells for one in audits for found in one.audits],
        "redistribution": [one.redistribution.correlations for one in audits if one.redistribution],
    }
    for name, frames in parts.items():
        table: pd.DataFrame = getattr(tables, name)
        assert table.columns[0] == "label"
        expected = pd.concat(frames, ignore_index=True)
        pd.testing.assert_frame_equal(table.drop(columns="label"), expected, check_exact=True)
        assert list(table.index) == list(range(len(table)))
    n = [sum(len(found.cells) for found in one.audits) for one in audits]
    assert list(tables.audit["label"]) == ["olmoe"] * n[0] + ["qwen <b>"] * n[1]
    of = tables.audit[["label", "scope", "how", "as_released"]].drop_duplicates()
    assert list(of.itertuples(index=False, name=None)) == [
        ("olmoe", "token", "zero", ""),
        ("olmoe", "token", "zero", "olmoe"),
        ("olmoe", "sequence", "zero", ""),
        ("olmoe", "sequence", "zero", "olmoe"),
        ("qwen <b>", "token", "reroute", ""),
    ]
    assert tables.audit["rho"].isna().sum() > 0
    assert tables.audit["d"].notna().all()
    assert set(tables.verification["passed"]) == {True}


def test_progressive_says_what_was_done() -> None:
    one = replace(first(), progressive=made_progressive(LAYERS, 7, scope="sequence"))
    tables = AuditTables.of([one, second()])
    assert list(tables.progressive.columns[:5]) == ["label", "scope", "how", "layer", "removed"]
    of = tables.progressive[["label", "scope", "how"]].drop_duplicates()
    assert list(of.itertuples(index=False, name=None)) == [
        ("olmoe", "sequence", "renormalize"),
        ("qwen <b>", "token", "renormalize"),
    ]
    assert one.progressive is not None
    expected = one.progressive.to_frame()
    ours = tables.progressive.iloc[: len(expected)].drop(columns=["label", "scope", "how"])
    pd.testing.assert_frame_equal(ours, expected, check_exact=True, check_dtype=False)


@pytest.mark.parametrize("fails", [0, 1])
def test_a_model_that_failed_has_its_checks_and_nothing_else(fails: int) -> None:
    """Even where it carries results, none of them comes in."""
    audits = [published_one(), second()]
    audits[fails] = replace(audits[fails], verification=made_model_audit("x", passed=False).verification)
    tables = AuditTables.of(audits)
    failed, other = audits[fails].label, audits[1 - fails].label
    assert not tables.passed
    assert [one["passed"] for one in tables.provenance] == [fails != 0, fails != 1]
    assert set(tables.verification["label"]) == {failed, other}
    of_failed = tables.verification.loc[tables.verification["label"] == failed]
    assert list(of_failed["passed"]) == [True, False, True]
    for name in ("audit", "progressive"):
        assert set(getattr(tables, name)["label"]) == {other}
    assert set(tables.redistribution["label"]) <= {other}
    assert set(tables.published["label"]) == ({"third"} if fails == 1 else set())


def test_none_passed(tmp_path: Path) -> None:
    audits = [made_model_audit("a", passed=False), made_model_audit("b", passed=False)]
    tables = AuditTables.of(audits)
    assert len(tables.verification) == 6
    for name in TABLES[1:]:
        assert getattr(tables, name).empty
        assert "label" in getattr(tables, name)
    assert_same(AuditTables.load(tables.save(tmp_path)), tables)


def test_what_is_not_asked_for_is_empty(tmp_path: Path) -> None:
    one = replace(published_one(), progressive=None)
    tables = AuditTables.of([one])
    assert tables.progressive.empty
    assert tables.redistribution.empty
    of_progressive = tables.published.loc[tables.published["family"] == "progressive"]
    assert len(of_progressive) == 54
    assert of_progressive["ours"].isna().all()
    assert_same(AuditTables.load(tables.save(tmp_path)), tables)


def test_published_rows_point_to_rows_of_the_saved_tables(tmp_path: Path) -> None:
    tables = AuditTables.of([first(), published_one(), second()])
    assert set(tables.published["label"]) == {"third"}
    assert tuple(tables.published.columns) == PUBLISHED_COLUMNS
    tables.save(tmp_path)
    files = {name: pd.read_parquet(tmp_path / f"{name}.parquet") for name in TABLES}
    columns = {"d": "d", "p_t": "p_t_plain", "p_wilcoxon": "p_wilcoxon_plain", "rho": "rho"}
    columns |= {"mean": "delta_loss", "median": "delta_loss_median", "p95": "delta_loss_p95"}
    named = files["published"].loc[files["published"]["ours_row"] != ""]
    # 20 cells by two sets of definitions, with two numbers; 5 of the control with four; 42 means; 12 of the tail.
    assert len(named) == 20 * 2 * 2 + 5 * 4 + 42 + 12
    for line in named.to_dict("records"):
        table, number = line["ours_row"].split(":")
        row = files[table].iloc[int(number)]
        assert row["label"] == line["label"] == "third"
        assert row["layer"] == line["layer"]
        assert line["ours"] == row[columns[line["quantity"]]]
    unnamed = files["published"].loc[files["published"]["ours_row"] == ""]
    assert unnamed["ours"].isna().all()


def test_definitions_in_published_rows_are_those_of_the_model() -> None:
    tables = AuditTables.of([published_one()])
    of = tables.published.query("family == 'metrics'")
    ours = of.loc[of["ours_definition"].str.startswith("as released: ")]
    assert len(ours) == 40
    own = of.drop(ours.index)
    assert list(own["ours_definition"]) == [f"ours of {metric} <&> 2" for metric in own["metric"]]


def test_provenance_is_of_each_model() -> None:
    audits = [first(), made_model_audit("bad", passed=False)]
    good, bad = AuditTables.of(audits).provenance
    assert (good["label"], good["model"], good["model_type"]) == ("olmoe", "olmoe", "olmoe")
    assert good["verified"] == {"dtype": "bfloat16", "n_documents": 3, "n_tokens": 456}
    assert [found["scope"] for found in good["audits"]] == ["token", "token", "sequence", "sequence"]
    assert good["progressive"] == dict(audits[0].progressive.provenance)  # type: ignore[union-attr]
    assert good["redistribution"] == dict(audits[0].redistribution.provenance)  # type: ignore[union-attr]
    assert (bad["passed"], bad["audits"], bad["progressive"], bad["redistribution"]) == (
        False,
        [],
        None,
        None,
    )


def test_saved_and_read_back(tmp_path: Path) -> None:
    tables = AuditTables.of([first(), second(), published_one(), made_model_audit("bad <i>é", passed=False)])
    assert tables.save(tmp_path) == tmp_path
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.parquet" for name in TABLES}
    assert_same(AuditTables.load(tmp_path), tables)
    assert AuditTables.load(tmp_path).labels == tables.labels
    # Numbers of rows are those of the files, whoever reads them.
    audit = pd.read_parquet(tmp_path / "audit.parquet")
    pd.testing.assert_frame_equal(audit, tables.audit, check_exact=True)
    # Saved again over what is there.
    AuditTables.of([second()]).save(tmp_path)
    assert AuditTables.load(tmp_path).labels == ("qwen <b>",)


@pytest.mark.parametrize("name", TABLES)
def test_a_file_that_is_missing_or_something_else(tmp_path: Path, name: str) -> None:
    AuditTables.of([second()]).save(tmp_path)
    path = tmp_path / f"{name}.parquet"
    other = tmp_path / f"{'audit' if name != 'audit' else 'progressive'}.parquet"
    path.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=rf"{name}\.parquet is no file of a tables_{name}"):
        AuditTables.load(tmp_path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=rf"{name}\.parquet is no file of a tables_{name}"):
        AuditTables.load(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"there is no file .*{name}\.parquet"):
        AuditTables.load(tmp_path)


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"audits of one or more models are wanted.*not \[\]"):
        AuditTables.of([])
    with pytest.raises(
        ValueError, match=r"each with a label of its own, not \['qwen <b>', 'olmoe', 'qwen <b>'\]"
    ):
        AuditTables.of([second(), first(), second()])
    with pytest.raises(FileNotFoundError):
        AuditTables.of([second()]).save(tmp_path / "none")
