"""The published audit's numbers beside ours: all of them, each beside the one that is computed as it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moe_lens.audit import Audit
from moe_lens.audit.protocol_presets import AUDIT_PRESETS
from moe_lens.audit.published import published_cells, published_progressive, published_redistribution
from moe_lens.audit.published_beside import COLUMNS, beside_published, published_key
from moe_lens.audit.released_metrics import RELEASED
from tests.audit_cases import made_audit, made_progressive, made_redistribution

NOTHING = pd.DataFrame(columns=["label"])
# How many numbers the paper prints in each of its tables. 1 to 3: four metrics at five layers, d and p_t; of Qwen also
# the p_W of section 3. 4 to 6: d, p_t, p_W and rho at five layers. 7: three lines at five layers. 8: k = 1 to 7 at six
# layers. 9: median and 95th percentile at six layers.
PRINTED = {
    "olmoe": {1: 40, 4: 20, 8: 42, 9: 12},
    "qwen2_moe": {2: 41, 5: 20, 7: 15},
    "deepseek_v2": {3: 40, 6: 20},
}
KEYS = tuple(PRINTED)
OURS = {"d": "d", "p_t": "p_t_plain", "p_wilcoxon": "p_wilcoxon_plain", "rho": "rho"}
OF_PROGRESSIVE = {"mean": "delta_loss", "median": "delta_loss_median", "p95": "delta_loss_p95"}
DEFINITIONS = {"utilization_rate": "share of tokens", "activation_norm": "mean norm"}


def stacked(audits: Sequence[Audit], first: int = 100) -> pd.DataFrame:
    """As they lie in the table of several models, after other rows."""
    frame = pd.concat([one.cells for one in audits], ignore_index=True)
    frame.insert(0, "label", "ours")
    return frame.set_index(pd.RangeIndex(first, first + len(frame)))


def progressive_of(layers: Sequence[int], most: int = 7, first: int = 40) -> pd.DataFrame:
    frame = made_progressive(layers, most).to_frame()
    frame.insert(0, "how", "renormalize")
    frame.insert(0, "scope", "token")
    return frame.set_index(pd.RangeIndex(first, first + len(frame)))


def redistribution_of(layers: Sequence[int], first: int = 7) -> pd.DataFrame:
    frame = made_redistribution(layers).correlations
    return frame.set_index(pd.RangeIndex(first, first + len(frame)))


def whole(key: str, audits: Sequence[Audit]) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """Everything of ours, and it beside the published."""
    tables = {
        "audit": stacked(audits),
        "progressive": progressive_of(range(27)),
        "redistribution": redistribution_of(range(27)),
    }
    beside = beside_published(
        "ours", key, tables["audit"], tables["progressive"], tables["redistribution"], DEFINITIONS
    )
    return tables, beside


# ---- which models it has ----


@pytest.mark.parametrize(
    ("model", "family", "key"),
    [
        ("allenai/OLMoE-1B-7B-0924", "olmoe", "olmoe"),
        ("Qwen/Qwen1.5-MoE-A2.7B", "qwen2_moe", "qwen2_moe"),
        ("deepseek-ai/DeepSeek-V2-Lite", "deepseek_v2", "deepseek_v2"),
        ("/models/OLMoE-1B-7B-0924", "olmoe", "olmoe"),
        ("models/olmoe-1b-7b-0924/", "olmoe", "olmoe"),
        ("DeepSeek-V2-Lite", "deepseek_v2", "deepseek_v2"),
        # Others of the family.
        ("allenai/OLMoE-1B-7B-0924-Instruct", "olmoe", None),
        ("allenai/OLMoE-1B-7B-0125", "olmoe", None),
        ("Qwen/Qwen1.5-MoE-A2.7B-Chat", "qwen2_moe", None),
        ("deepseek-ai/DeepSeek-V2", "deepseek_v2", None),
        ("OLMoE-1B-7B-0924/fine-tuned", "olmoe", None),
        ("mini", "olmoe", None),
        ("", "olmoe", None),
        # A name is not enough: the family must be its own.
        ("allenai/OLMoE-1B-7B-0924", "qwen2_moe", None),
        ("Qwen/Qwen1.5-MoE-A2.7B", "qwen3_moe", None),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral", None),
    ],
)
def test_which_models_it_has(model: str, family: str, key: str | None) -> None:
    assert published_key(model, family) == key


# ---- all numbers ----


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("ours", ["none", "one", "two scopes", "two definitions", "four"])
def test_every_number_of_the_paper_has_its_rows(key: str, ours: str) -> None:
    layers = range(27)
    kinds = {
        "none": [],
        "one": [("token", "")],
        "two scopes": [("token", ""), ("sequence", "")],
        "two definitions": [("token", ""), ("token", key)],
        "four": [("token", ""), ("token", key), ("sequence", ""), ("sequence", key)],
    }[ours]
    if kinds:
        audits = [made_audit(layers, scope=scope, as_released=released) for scope, released in kinds]
        _, beside = whole(key, audits)
    else:
        beside = beside_published("ours", key, NOTHING, NOTHING, NOTHING, {})
    of_metrics = max(len(kinds), 1)
    of_control = max(len({scope for scope, _ in kinds}), 1)
    times = {table: of_metrics if table <= 3 else of_control if table <= 6 else 1 for table in PRINTED[key]}
    expected = {table: n * times[table] for table, n in PRINTED[key].items()}
    assert beside["table"].value_counts().to_dict() == expected
    assert tuple(beside.columns) == COLUMNS
    assert set(beside["label"]) == {"ours"}
    assert beside["published"].notna().all()
    place = ["table", "family", "metric", "layer", "removed", "quantity"]
    n = beside.groupby(place, sort=False).size()
    assert len(n) == sum(PRINTED[key].values())
    assert not beside.duplicated([*place, "ours_row"]).any()
    if not kinds:
        assert beside["ours"].isna().all()
        marks = beside[["ours_row", "ours_definition", "ours_scope", "ours_sampling"]]
        assert (marks == "").all(axis=None)
    else:
        assert (beside["ours_row"] != "").all()


@pytest.mark.parametrize("key", KEYS)
def test_the_published_numbers_are_those_of_the_paper(key: str) -> None:
    """Against the data: each number under its own table, metric, layer and k."""
    beside = beside_published("ours", key, NOTHING, NOTHING, NOTHING, {})
    found = {
        (row["table"], row["metric"], row["layer"], row["removed"], row["quantity"]): row["published"]
        for row in beside.to_dict("records")
    }
    expected: dict[tuple[Any, ...], float] = {}
    for cell in published_cells(key).itertuples():
        for name in OURS:
            expected[(cell.table, cell.metric, cell.layer, 0, name)] = getattr(cell, name)
    if key == "olmoe":
        for cell in published_progressive().itertuples():
            expected[(8, "delta_loss", cell.layer, cell.k, "mean")] = cell.mean
            for name in ("median", "p95"):
                expected[(9, "delta_loss", cell.layer, cell.k, name)] = getattr(cell, name)
    if key == "qwen2_moe":
        for cell in published_redistribution().itertuples():
            at = (cell.layer, 0)
            expected[(7, "routing_weight, gap_norm", *at, "rho")] = cell.rho_weight_gap
            expected[(7, "gap_norm, relative_compensation", *at, "rho")] = cell.rho_gap_compensation
            expected[(7, "mean_gap_norm", *at, "mean_gap_norm")] = cell.mean_gap_norm
    assert found == {place: value for place, value in expected.items() if not math.isnan(value)}


def test_numbers_copied_from_the_paper() -> None:
    """A few by hand, one of each table."""
    by_hand: list[tuple[str, dict[str, Any], float]] = [
        ("olmoe", dict(table=1, metric="activation_std", layer=11, quantity="p_t"), 0.048),
        ("qwen2_moe", dict(table=2, metric="activation_std", layer=23, quantity="d"), 0.222),
        ("qwen2_moe", dict(table=2, metric="activation_std", layer=23, quantity="p_wilcoxon"), 0.036),
        ("deepseek_v2", dict(table=3, metric="utilization_rate", layer=20, quantity="d"), 0.163),
        ("olmoe", dict(table=4, metric="routing_weight", layer=15, quantity="p_t"), 0.0013),
        ("olmoe", dict(table=4, metric="routing_weight", layer=15, quantity="rho"), 0.199),
        ("qwen2_moe", dict(table=5, metric="routing_weight", layer=18, quantity="p_wilcoxon"), 0.922),
        ("deepseek_v2", dict(table=6, metric="routing_weight", layer=26, quantity="d"), 0.098),
        ("qwen2_moe", dict(table=7, metric="gap_norm, relative_compensation", layer=6), 0.394),
        ("qwen2_moe", dict(table=7, metric="mean_gap_norm", layer=23), 0.440),
        ("olmoe", dict(table=8, layer=15, removed=2), 0.155),
        ("olmoe", dict(table=9, layer=15, removed=7, quantity="p95"), 2.633),
    ]
    for key, where, value in by_hand:
        rows = beside_published("ours", key, NOTHING, NOTHING, NOTHING, {})
        for name, wanted in where.items():
            rows = rows.loc[rows[name] == wanted]
        assert list(rows["published"]) == [value], (key, where)


# ---- ours ----


@pytest.mark.parametrize("key", KEYS)
def test_ours_is_the_number_of_the_named_row(key: str) -> None:
    audits = [
        made_audit(range(27), scope=scope, as_released=released)
        for scope in ("token", "sequence")
        for released in ("", key)
    ]
    tables, beside = whole(key, audits)
    seen = set()
    for line in beside.to_dict("records"):
        name, number = line["ours_row"].split(":")
        row = tables[name].loc[int(number)]
        assert row["layer"] == line["layer"]
        column = OURS.get(line["quantity"], line["quantity"])
        if line["family"] in ("metrics", "control"):
            assert name == "audit"
            assert (row["family"], row["metric"]) == (line["family"], line["metric"])
        elif line["family"] == "progressive":
            assert name == "progressive"
            assert row["removed"] == line["removed"]
            column = OF_PROGRESSIVE[line["quantity"]]
        else:
            assert name == "redistribution"
            assert row["given"] == ""
            if line["quantity"] == "rho":
                assert f"{row['x']}, {row['y']}" == line["metric"]
        assert line["ours"] == row[column]
        assert isinstance(line["ours"], float)
        seen.add((name, column))
    expected = {("audit", name) for name in OURS.values()}
    expected |= {("progressive", name) for name in OF_PROGRESSIVE.values()} if key == "olmoe" else set()
    expected |= (
        {("redistribution", "rho"), ("redistribution", "mean_gap_norm")} if key == "qwen2_moe" else set()
    )
    assert seen == expected


def test_every_audit_of_a_cell_has_its_row() -> None:
    """Two scopes and two sets of definitions are four rows of a metric's cell, and two of the control's: what the
    metrics are by definition makes no difference to it."""
    audits = [
        made_audit(range(16), scope=scope, as_released=released, n_positions=n)
        for n, (scope, released) in enumerate(
            [("token", ""), ("token", "olmoe"), ("sequence", ""), ("sequence", "olmoe")], start=1000
        )
    ]
    _, beside = whole("olmoe", audits)
    cell = beside.query("metric == 'activation_norm' and layer == 7 and quantity == 'd'")
    assert list(cell[["ours_scope", "ours_sampling"]].itertuples(index=False, name=None)) == [
        ("token, zero", "1,000 positions"),
        ("token, zero", "1,001 positions"),
        ("sequence, zero", "1,002 positions"),
        ("sequence, zero", "1,003 positions"),
    ]
    released = f"as released: {RELEASED['olmoe'].definitions['activation_norm']}"
    assert list(cell["ours_definition"]) == ["mean norm", released] * 2
    control = beside.query("family == 'control' and layer == 7 and quantity == 'd'")
    assert list(control["ours_scope"]) == ["token, zero", "sequence, zero"]
    assert list(control["ours_sampling"]) == ["1,000 positions", "1,002 positions"]
    assert set(control["ours_definition"]) == {"routing weight of the expert at the position"}


def test_cells_that_are_not_among_ours() -> None:
    """Layers, metrics and numbers of experts that ours has not: the published number stays, ours is NaN."""
    audits = [made_audit((0, 15), metrics=("activation_norm", "random"))]
    beside = beside_published(
        "ours", "olmoe", stacked(audits), progressive_of((0, 15), most=3), NOTHING, DEFINITIONS
    )
    assert beside["table"].value_counts().to_dict() == PRINTED["olmoe"]
    has = beside.loc[beside["ours_row"] != ""]
    assert set(has.loc[has["family"] == "metrics", "metric"]) == {"activation_norm"}
    assert set(has["layer"]) == {0, 15}
    assert has["table"].value_counts().to_dict() == {1: 4, 4: 8, 8: 6}  # two layers, and k to 3
    without = beside.drop(has.index)
    assert without["ours"].isna().all()
    assert (without[["ours_definition", "ours_scope", "ours_sampling"]] == "").all(axis=None)
    assert (without[["published_definition", "published_scope", "published_sampling"]] != "").all(axis=None)


def test_a_number_that_ours_has_not_is_nan_with_its_row() -> None:
    """A cell without a test is there, and has none."""
    one = made_audit((0,))
    one.cells.loc[one.cells["metric"] == "activation_norm", ["d", "p_t_plain"]] = np.nan
    beside = beside_published("ours", "olmoe", stacked([one]), NOTHING, NOTHING, DEFINITIONS)
    cell = beside.query("metric == 'activation_norm' and layer == 0")
    assert cell["ours"].isna().all()
    assert (cell["ours_row"] != "").all()


def test_a_partial_correlation_is_no_correlation() -> None:
    """The rows given the gap norm come first here: none of them is taken."""
    ours = redistribution_of((0, 6, 12, 18, 23))
    ours = ours.sort_values("given", ascending=False, kind="stable")
    partial = ours.loc[ours["given"] != ""].assign(x="routing_weight", y="gap_norm")
    ours = pd.concat([partial.set_index(pd.RangeIndex(900, 900 + len(partial))), ours])
    beside = beside_published("ours", "qwen2_moe", NOTHING, NOTHING, ours, {})
    rows = beside.query("family == 'redistribution'")
    assert len(rows) == 15
    numbers = [int(row.removeprefix("redistribution:")) for row in rows["ours_row"]]
    assert all(ours.loc[number, "given"] == "" for number in numbers)


# ---- what each is of ----


@pytest.mark.parametrize("key", KEYS)
def test_what_the_published_number_is_of(key: str) -> None:
    """Definition, scope and sampling, as the paper and its released code have them."""
    _, beside = whole(key, [made_audit(range(27))])
    by_line = (
        "with replacement: a line uniformly, then a position of it but the first and the last, uniformly"
    )
    uniform = "uniformly over positions, without replacement"
    drawn = {"olmoe": uniform, "qwen2_moe": by_line, "deepseek_v2": uniform}[key]
    of_metrics, control = (beside.loc[beside["family"] == family] for family in ("metrics", "control"))
    assert set(of_metrics["published_sampling"]) == {f"n = 200, drawn {drawn}"}
    # `routing_weight_control_olmoe.py` and `..._deepseek.py` draw lines, as Qwen's script does for both.
    assert set(control["published_sampling"]) == {f"n = 200, drawn {by_line}"}
    cells = pd.concat([of_metrics, control])
    assert set(cells["published_scope"]) == {
        "the paper: at the one position; its released code: at every position of the text"
    }
    assert set(control["published_definition"]) == {"routing weight of the expert at the position"}
    assert set(control["ours_definition"]) == {"routing weight of the expert at the position"}
    for metric, rows in of_metrics.groupby("metric"):
        (said,) = set(rows["published_definition"])
        paper, code = said.split("; its released code: ")
        assert code == RELEASED[key].definitions[str(metric)]
        # Section 2 says what one of the four is.
        assert paper == (
            "the paper: mean routing weight over the tokens that select the expert"
            if metric == "mean_routing_weight"
            else "the paper names it"
        )
        assert set(rows["ours_definition"]) == {DEFINITIONS.get(str(metric), "")}
    assert set(cells["ours_scope"]) == {"token, zero"}
    assert set(cells["ours_sampling"]) == {"1,234 positions"}
    assert AUDIT_PRESETS[key].n == 200


def test_what_progressive_removal_and_redistribution_are_of() -> None:
    _, olmoe = whole("olmoe", [made_audit(range(27))])
    removal = olmoe.query("family == 'progressive'")
    assert set(removal["published_sampling"]) == {"n = 500, one position of each line, the lines shuffled"}
    assert set(removal["published_scope"]) == {
        "the paper: at the one position; its released code: at every position of the text"
    }
    assert set(removal["ours_scope"]) == {"token, renormalize"}
    assert set(removal["ours_sampling"]) == {"12 positions"}
    (definition,) = set(removal["published_definition"])
    assert "k heaviest active experts, nats" in definition
    assert set(removal["ours_definition"]) == {definition}
    assert removal.query("table == 8")["removed"].value_counts().to_dict() == dict.fromkeys(range(1, 8), 6)
    assert set(removal.query("table == 9")["removed"]) == {7}
    tables, qwen = whole("qwen2_moe", [made_audit(range(27))])
    moved = qwen.query("family == 'redistribution'")
    assert set(moved["published_sampling"]) == {"34,016 activations; all tokens of the lines"}
    assert set(moved["published_scope"]) == set(moved["ours_scope"]) == {"one forward pass"}
    for line in moved.to_dict("records"):
        row = tables["redistribution"].loc[int(line["ours_row"].split(":")[1])]
        assert line["ours_sampling"] == f"{row['n_experts']} experts"
        assert line["ours_definition"] == line["published_definition"]
