"""The published audit's numbers beside ours: all of them, each beside the one that is computed as it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from moe_lens.audit import Audit
from moe_lens.audit.audit_tables import AuditTables
from moe_lens.audit.paired_tests import paired_test
from moe_lens.audit.protocol_presets import AUDIT_PRESETS
from moe_lens.audit.published import published_cells, published_progressive, published_redistribution
from moe_lens.audit.published_beside import COLUMNS, SIDES, Ours, beside_published, published_key
from moe_lens.audit.released_metrics import RELEASED
from tests.audit_cases import CORPUS, made_audit, made_model_audit, made_progressive, made_redistribution

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
OF_OURS, OF_PUBLISHED = ([f"{side}_{name}" for name in SIDES] for side in ("ours", "published"))
OF_PROGRESSIVE = {"mean": "delta_loss", "median": "delta_loss_median", "p95": "delta_loss_p95"}


def stacked(audits: Sequence[Audit], first: int = 100) -> tuple[pd.DataFrame, list[Ours]]:
    """As they lie in the table of several models, after other rows; and each by itself."""
    frame = pd.concat([one.cells for one in audits], ignore_index=True)
    frame.insert(0, "label", "ours")
    frame = frame.set_index(pd.RangeIndex(first, first + len(frame)))
    parts, start = [], 0
    for one in audits:
        parts.append(Ours(frame.iloc[start : start + len(one.cells)], one.provenance))
        start += len(one.cells)
    return frame, parts


def progressive_of(layers: Sequence[int], most: int = 7, first: int = 40) -> Ours:
    made = made_progressive(layers, most)
    frame = made.to_frame()
    frame.insert(0, "how", "renormalize")
    frame.insert(0, "scope", "token")
    return Ours(frame.set_index(pd.RangeIndex(first, first + len(frame))), made.provenance)


def redistribution_of(layers: Sequence[int], first: int = 7) -> Ours:
    made = made_redistribution(layers)
    frame = made.correlations
    return Ours(frame.set_index(pd.RangeIndex(first, first + len(frame))), made.provenance)


def whole(key: str, audits: Sequence[Audit]) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """Everything of ours, and it beside the published."""
    frame, parts = stacked(audits)
    progressive, redistribution = progressive_of(range(27)), redistribution_of(range(27))
    tables = {"audit": frame, "progressive": progressive.rows, "redistribution": redistribution.rows}
    return tables, beside_published("ours", key, parts, progressive, redistribution)


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
        beside = beside_published("ours", key)
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
        assert (beside[["ours_row", *OF_OURS]] == "").all(axis=None)
        assert (beside["ours_n"] == 0).all()
    else:
        assert (beside[["ours_row", *OF_OURS]] != "").all(axis=None)
        assert (beside["ours_n"] > 0).all()
    assert (beside[OF_PUBLISHED] != "").all(axis=None)
    assert (beside["published_n"] > 0).all()


@pytest.mark.parametrize("key", KEYS)
def test_the_published_numbers_are_those_of_the_paper(key: str) -> None:
    """Against the data: each number under its own table, metric, layer and k."""
    beside = beside_published("ours", key)
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
        rows = beside_published("ours", key)
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
    assert list(cell["ours_scope"]) == ["token, zero"] * 2 + ["sequence, zero"] * 2
    assert [positions_in(text) for text in cell["ours_sampling"]] == [1000, 1001, 1002, 1003]
    released = f"as released: {RELEASED['olmoe'].definitions['activation_norm']}"
    assert list(cell["ours_definition"]) == ["ours of activation_norm <&> 0", released] * 2
    control = beside.query("family == 'control' and layer == 7 and quantity == 'd'")
    assert list(control["ours_scope"]) == ["token, zero", "sequence, zero"]
    assert [positions_in(text) for text in control["ours_sampling"]] == [1000, 1002]
    assert set(control["ours_definition"]) == {"routing weight of the expert at the position"}


def positions_in(sampling: str) -> int:
    return int(sampling.split(" pairs of ")[1].split(" positions")[0].replace(",", ""))


def test_cells_that_are_not_among_ours() -> None:
    """Layers, metrics and numbers of experts that ours has not: the published number stays, ours is NaN."""
    audits = [made_audit((0, 15), metrics=("activation_norm", "random"))]
    beside = beside_published("ours", "olmoe", stacked(audits)[1], progressive_of((0, 15), most=3))
    assert beside["table"].value_counts().to_dict() == PRINTED["olmoe"]
    has = beside.loc[beside["ours_row"] != ""]
    assert set(has.loc[has["family"] == "metrics", "metric"]) == {"activation_norm"}
    assert set(has["layer"]) == {0, 15}
    assert has["table"].value_counts().to_dict() == {1: 4, 4: 8, 8: 6}  # two layers, and k to 3
    without = beside.drop(has.index)
    assert without["ours"].isna().all()
    assert (without[OF_OURS] == "").all(axis=None)
    assert (without[OF_PUBLISHED] != "").all(axis=None)


def test_a_number_that_ours_has_not_is_nan_with_its_row() -> None:
    """A cell without a test is there, and has none."""
    one = made_audit((0,))
    one.cells.loc[one.cells["metric"] == "activation_norm", ["d", "p_t_plain"]] = np.nan
    beside = beside_published("ours", "olmoe", stacked([one])[1])
    cell = beside.query("metric == 'activation_norm' and layer == 0")
    assert cell["ours"].isna().all()
    assert (cell["ours_row"] != "").all()


def test_a_partial_correlation_is_no_correlation() -> None:
    """The rows given the gap norm come first here: none of them is taken."""
    made = redistribution_of((0, 6, 12, 18, 23))
    ours = made.rows.sort_values("given", ascending=False, kind="stable")
    partial = ours.loc[ours["given"] != ""].assign(x="routing_weight", y="gap_norm")
    ours = pd.concat([partial.set_index(pd.RangeIndex(900, 900 + len(partial))), ours])
    beside = beside_published("ours", "qwen2_moe", redistribution=Ours(ours, made.provenance))
    rows = beside.query("family == 'redistribution'")
    assert len(rows) == 15
    numbers = [int(row.removeprefix("redistribution:")) for row in rows["ours_row"]]
    assert all(ours.loc[number, "given"] == "" for number in numbers)


# ---- what each is of ----


LINES = "lines of more than 50 characters, the first 100, cut to 512 tokens"
TIES = "where experts tie, whichever its sort puts first or last is taken"


@pytest.mark.parametrize("key", KEYS)
def test_what_the_published_number_is_of(key: str) -> None:
    """As the paper and its released code have them."""
    _, beside = whole(key, [made_audit(range(27))])
    by_line = (
        "with replacement: a line uniformly, then a position of it but the first and the last, uniformly"
    )
    uniform = "uniformly over positions, without replacement"
    drawn = {"olmoe": uniform, "qwen2_moe": by_line, "deepseek_v2": uniform}[key]
    of_metrics, control = (beside.loc[beside["family"] == family] for family in ("metrics", "control"))
    assert set(of_metrics["published_sampling"]) == {f"n = 200, drawn {drawn}; {TIES}"}
    # `routing_weight_control_olmoe.py` and `..._deepseek.py` draw lines, as Qwen's script does for both.
    equal = "; positions whose weights differ by less than 1e-6 are not drawn" if key == "deepseek_v2" else ""
    assert set(control["published_sampling"]) == {f"n = 200, drawn {by_line}; {TIES}{equal}"}
    cells = pd.concat([of_metrics, control])
    precision = {"olmoe": "float32", "qwen2_moe": "bfloat16", "deepseek_v2": "float16"}[key]
    assert set(cells["published_corpus"]) == {
        f"WikiText-2's raw test split: {LINES}; {precision} in its released code"
    }
    assert set(cells["published_n"]) == {200}
    assert set(cells["published_scope"]) == {
        "set to zero; the paper: at the one position; its released code: at every position of the text"
    }
    assert set(control["published_definition"]) == {"routing weight of the expert at the position"}
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
    assert AUDIT_PRESETS[key].n == 200


@pytest.mark.parametrize("key", KEYS)
def test_which_standard_deviation_d_is_over(key: str) -> None:
    """`diffs.std()` in the scripts for the metrics of OLMoE and DeepSeek; `np.std(diffs, ddof=1)` in the others."""
    _, beside = whole(key, [made_audit(range(27))])
    d = beside.query("quantity == 'd'")
    assert set(d["ours_statistic"]) == {"mean over standard deviation with ddof 1"}
    for family, rows in d.groupby("family"):
        (said,) = set(rows["published_statistic"])
        with_0 = family == "metrics" and key != "qwen2_moe"
        assert said.startswith(f"mean over standard deviation with ddof {0 if with_0 else 1}")
        assert ("sqrt(n / (n - 1)) times that with ddof 1, 0.25% more at n = 200" in said) == with_0
    differences = np.random.default_rng(0).normal(size=200)
    ratio = differences.std(ddof=1) / differences.std()
    assert round(100 * (ratio - 1), 2) == 0.25
    assert np.isclose(ratio, np.sqrt(200 / 199))


@pytest.mark.parametrize("key", KEYS)
def test_what_becomes_of_differences_that_are_zero(key: str) -> None:
    _, beside = whole(key, [made_audit(range(27))])
    p = beside.query("quantity == 'p_wilcoxon'")
    assert len(p) == (6 if key == "qwen2_moe" else 5)
    assert p["published_statistic"].str.contains("zero are dropped before ranking").all()
    assert p["published_statistic"].str.contains("'wilcox'").all()
    assert (
        p["ours_statistic"]
        .str.contains("zero are ranked with the others and then dropped (Pratt)", regex=False)
        .all()
    )
    # So is ours.
    rng = np.random.default_rng(1)
    x = np.concatenate([np.zeros(15), rng.normal(0.3, size=40)])
    pratt, wilcox = (stats.wilcoxon(x, zero_method=name).pvalue for name in ("pratt", "wilcox"))
    ours = paired_test(x, np.zeros_like(x)).p_wilcoxon_plain
    assert ours == pytest.approx(pratt)
    assert ours != pytest.approx(wilcox, rel=1e-3)


def test_what_our_number_is_of() -> None:
    """Counts of the very row, the corpus and the precision of its census, and whether positions were drawn."""
    all_of_it, drawn = made_audit(range(16)), made_audit(range(16), scope="sequence", seed=1)
    drawn = Audit(drawn.cells, {**drawn.provenance, "settings": {"compare": 1, "n": 200}})
    of_census = {
        **all_of_it.provenance["census"],
        "corpus": "another",
        "dtype": "float32",
        "sample": {"n": 9},
    }
    sampled = made_audit(range(16), how="mean", seed=2)
    sampled = Audit(sampled.cells, {**sampled.provenance, "census": of_census})
    tables, beside = whole("olmoe", [all_of_it, drawn, sampled])
    seen = set()
    for line in beside.query("table in (1, 4)").to_dict("records"):
        row = tables["audit"].loc[int(line["ours_row"].split(":")[1])]
        counts = (
            f"{row['n_pairs']:,} pairs of {row['n_positions']:,} positions ({row['n_ties']:,} tied, "
            f"{row['n_undefined']:,} undefined left out)"
        )
        chosen = (
            ""
            if row["scope"] == "token" and row["how"] == "zero"
            else ", drawn uniformly without replacement"
        )
        assert line["ours_sampling"] == counts + chosen
        assert line["ours_n"] == row["n_pairs"]
        corpus = "another; float32" if row["how"] == "mean" else f"{CORPUS}; bfloat16"
        assert line["ours_corpus"] == corpus
        assert line["ours_scope"] == f"{row['scope']}, {row['how']}"
        seed = {"token, zero": 0, "sequence, zero": 1, "token, mean": 2}[line["ours_scope"]]
        if line["family"] == "metrics":
            assert line["ours_definition"] == f"ours of {line['metric']} <&> {seed}"
        seen.add(line["ours_scope"])
    assert len(seen) == 3


def test_in_the_tables_every_audit_is_of_its_own_corpus() -> None:
    audits = []
    for scope, corpus in [("token", "first text"), ("sequence", "second text")]:
        one = made_audit(range(16), scope=scope)
        census = {**one.provenance["census"], "corpus": corpus}
        audits.append(Audit(one.cells, {**one.provenance, "census": census}))
    name = "allenai/OLMoE-1B-7B-0924"
    tables = AuditTables.of([made_model_audit("other", audits=audits), made_model_audit(name, audits=audits)])
    rows = tables.published.query("table in (1, 4)")
    assert dict(zip(rows["ours_scope"], rows["ours_corpus"], strict=True)) == {
        "token, zero": "first text; bfloat16",
        "sequence, zero": "second text; bfloat16",
    }


@pytest.mark.parametrize("compare", [2, 3])
def test_means_over_several_experts_are_not_laid_beside(compare: int) -> None:
    """Nor do they hide an audit that can be."""
    several = made_audit(range(16), compare=compare)
    _, beside = whole("olmoe", [several])
    assert beside["table"].value_counts().to_dict() == PRINTED["olmoe"]
    cells = beside.query("table in (1, 4)")
    assert cells["ours"].isna().all()
    assert (cells[["ours_row", *(name for name in OF_OURS if name != "ours_definition")]] == "").all(
        axis=None
    )
    (why,) = set(cells["ours_definition"])
    assert f"our audit compares the mean of the {compare} highest experts with that of the lowest" in why
    assert "another experiment" in why
    # Progressive removal compares nothing.
    assert beside.query("table > 6")["ours"].notna().all()
    one = made_audit(range(16), scope="sequence")
    tables, beside = whole("olmoe", [several, one])
    assert beside["table"].value_counts().to_dict() == PRINTED["olmoe"]
    rows = [int(name.split(":")[1]) for name in beside.query("table in (1, 4)")["ours_row"]]
    assert set(tables["audit"].loc[rows, "scope"]) == {"sequence"}


def test_what_progressive_removal_is_of() -> None:
    _, olmoe = whole("olmoe", [made_audit(range(27))])
    removal = olmoe.query("family == 'progressive'")
    assert set(removal["published_sampling"]) == {"n = 500, one position of each line, the lines shuffled"}
    assert set(removal["published_scope"]) == {
        "set to zero; the paper: at the one position; its released code: at every position of the text"
    }
    assert set(removal["published_corpus"]) == {
        "WikiText-2's raw test split: lines of more than 100 characters and at least 33 tokens, cut to 256 tokens; "
        "float16 (float32 without CUDA) in its released code"
    }
    assert set(removal["ours_scope"]) == {"token, renormalize"}
    assert set(removal["ours_sampling"]) == {"12 positions, drawn uniformly without replacement"}
    assert set(removal["ours_corpus"]) == {f"{CORPUS}; bfloat16"}
    assert set(removal["ours_n"]) == {12}
    (definition,) = set(removal["published_definition"])
    assert "k heaviest active experts, nats" in definition
    assert set(removal["ours_definition"]) == {definition}
    assert removal.query("table == 8")["removed"].value_counts().to_dict() == dict.fromkeys(range(1, 8), 6)
    assert set(removal.query("table == 9")["removed"]) == {7}
    assert set(removal.query("quantity == 'median'")["published_statistic"]) == {"median over positions"}
    made = progressive_of(range(16))
    for sample, said in [
        (None, "12 positions"),
        (
            {"n": 12, "per_document": 1},
            "12 positions, drawn uniformly without replacement, at most 1 of a document",
        ),
    ]:
        ours = Ours(made.rows, {**made.provenance, "sample": sample})
        rows = beside_published("ours", "olmoe", progressive=ours).query("table == 8")
        assert set(rows["ours_sampling"]) == {said}


def test_what_redistribution_is_of() -> None:
    tables, qwen = whole("qwen2_moe", [made_audit(range(27))])
    moved = qwen.query("family == 'redistribution'")
    (sampling,) = set(moved["published_sampling"])
    # `n_tokens` of redistribution_layer0_full.json and others is what the paper gives as activations.
    assert "the paper: 34,016 activations; in its released results that is the number of tokens" in sampling
    assert set(moved["published_n"]) == {34_016}
    assert set(moved["ours_n"]) == {4321}
    assert set(moved["published_corpus"]) == {
        "WikiText-2's raw test split: lines of more than 100 characters, the first 200, cut to 256 tokens; bfloat16 "
        "in its released code"
    }
    assert set(moved["ours_corpus"]) == {f"{CORPUS}; bfloat16"}
    assert set(moved["published_scope"]) == set(moved["ours_scope"]) == {"one forward pass"}
    for line in moved.to_dict("records"):
        row = tables["redistribution"].loc[int(line["ours_row"].split(":")[1])]
        assert line["ours_sampling"] == f"{row['n_experts']} experts; 4,321 tokens, all of the corpus"
        assert line["published_definition"] == line["ours_definition"]
        assert "pairs the two by row" in line["published_sampling"]
        assert "never active count as 0" in line["published_statistic"]
        assert "never active are left out" in line["ours_statistic"]
