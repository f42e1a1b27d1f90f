"""The audit: its cells against Python loops, planted truths, families, samples, and what it refuses."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from statsmodels.stats.multitest import multipletests

from moe_lens.audit.census_table import Census, CensusWriter
from moe_lens.audit.metric_comparison import within_token_rank
from moe_lens.audit.metric_table import MetricTable
from moe_lens.audit.paired_tests import paired_test
from moe_lens.audit.protocol import CONTROLS, Audit, audit
from moe_lens.audit.protocol_odds import within_position_rank
from tests.reference_protocol import beyond_of, odds_of, pairs_of, positions_of

N_EXPERTS = 12
IDENTITY = {
    "kind": "census",
    "model": "tiny",
    "revision": None,
    "dtype": "float32",
    "weights": "f" * 64,
    "how": "zero",
    "scope": "token",
    "tokens": "t",
}
Rows = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _quick_corrections(monkeypatch: pytest.MonkeyPatch) -> None:
    """statsmodels collects garbage at every correction, which takes it a third of a second beside torch."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


def census_of(
    n_documents: int = 12,
    *,
    length: int = 9,
    k: int = 4,
    layers: Sequence[int] = (1, 4),
    delta: Callable[[Rows, np.random.Generator], np.ndarray] | None = None,
    identity: Mapping[str, Any] = IDENTITY,
    shared: bool = True,
    seed: int = 0,
) -> Census:
    """Documents of unlike lengths; experts drawn at random, weights and losses on a grid, so that some tie."""
    rng = np.random.default_rng(seed)
    with CensusWriter(None, identity, extra=["first_order", "kl"]) as writer:
        for document in range(n_documents):
            n = int(rng.integers(1, 2 * length))
            ranks = np.arange(0 if shared else 1, k + 1)
            position, layer, rank = (
                axis.ravel() for axis in np.meshgrid(np.arange(n), layers, ranks, indexing="ij")
            )
            experts = rng.permuted(np.tile(np.arange(N_EXPERTS), (n * len(layers), 1)), axis=1)
            rows: Rows = {
                "position": position,
                "layer": layer,
                "rank": rank,
                "expert": np.where(rank == 0, -1, experts[:, : len(ranks)].ravel()),
                # The last of them is sometimes zero, as a softmax may be in float32.
                "routing_weight": np.round((k - rank) / 8 + rng.uniform(0, 0.4, len(rank)), 1),
                "first_order": rng.normal(size=len(rank)),
                "gap_norm": rng.uniform(size=len(rank)),
                "loss": np.ones(len(rank)),
                "kl": np.ones(len(rank)),
            }
            if delta is None:
                rows["delta_loss"] = np.round(rng.normal(size=len(rank)) + 0.2, 1)
            else:
                rows["delta_loss"] = delta(rows, rng)
            columns = {
                name: values.astype(np.float32 if values.dtype.kind == "f" else np.int64)
                for name, values in rows.items()
            }
            writer.add_document(document, columns)
        return writer.finish({"seconds": 1.0})


def table_of(layers: Sequence[int] = (1, 4), **values: Any) -> MetricTable:
    shape = (len(layers), N_EXPERTS)
    arrays = {name: np.broadcast_to(np.asarray(v, np.float64), shape).copy() for name, v in values.items()}
    provenance = {
        "model": "tiny", "revision": None, "dtype": "float32", "weights": "f" * 64, "edited": [], "corpus": "c",
        "fingerprint": "t", "seed": 0, "definitions": {}, "as_released": None, "n_padding_counted": 0,
    }  # fmt: skip
    return MetricTable(
        layers=tuple(layers),
        values=arrays,
        standard_errors={name: np.full(shape, np.nan) for name in arrays},
        counts=np.full(shape, 5),
        n_tokens=100,
        n_documents=7,
        provenance=provenance,
    )


FINE = np.random.default_rng(1).permutation(2 * N_EXPERTS).reshape(2, N_EXPERTS) / 7
COARSE = np.arange(N_EXPERTS) // 3
HOLES = np.where(np.isin(np.arange(N_EXPERTS), (2, 5)), np.nan, COARSE)


def claiming_low(table: MetricTable, *names: str) -> MetricTable:
    """The same table, in which a low value of these metrics claims importance."""
    return with_provenance(table, higher_is_more_important=dict.fromkeys(names, False))


def cell(found: Audit, family: str, metric: str, layer: int) -> dict[str, Any]:
    cells = found.cells
    rows = cells[(cells["family"] == family) & (cells["metric"] == metric) & (cells["layer"] == layer)]
    assert len(rows) == 1
    return rows.iloc[0].to_dict()


# ---- against the loops ----


@pytest.mark.parametrize(("k", "compare"), [(4, 1), (4, 2), (2, 1), (5, 2)])
def test_cells_are_those_of_the_loops(k: int, compare: int) -> None:
    census = census_of(k=k)
    table = claiming_low(
        table_of(fine=FINE, coarse=COARSE, holes=HOLES, low=FINE, lower=HOLES), "low", "lower"
    )
    found = audit(census, table, compare=compare)
    frame = census.to_pandas()
    assert len(found.cells) == 7 * 2
    dropped = {"n_ties": 0, "n_undefined": 0}
    for layer in (1, 4):
        positions = positions_of(frame, layer)
        values: dict[tuple[str, str], Callable[[Any], float]] = {
            ("metrics", name): lambda row, name=name: (
                (-1 if name in ("low", "lower") else 1)
                * float(table.values[name][table.layers.index(row.layer), row.expert])
            )
            for name in table.metrics
        }
        values |= {("control", name): lambda row, name=name: float(getattr(row, name)) for name in CONTROLS}
        for (family, metric), value in values.items():
            got = cell(found, family, metric, layer)
            want = pairs_of(positions, value, compare)
            for name in ("n_positions", "n_undefined", "n_ties"):
                assert got[name] == getattr(want, name), (family, metric, name)
            for name in dropped:
                dropped[name] += got[name]
            assert got["higher_is_more_important"] is (metric not in ("low", "lower"))
            assert got["n_positions"] == got["n_undefined"] + got["n_ties"] + got["n_pairs"]
            test = paired_test(want.high, want.low, want.documents)
            assert got["n_pairs"] == test.n_pairs > 5
            assert got["n_documents"] == test.n_clusters
            assert (got["d_low"], got["d_high"]) == pytest.approx(test.d_ci)
            assert got["high_delta_loss"] == pytest.approx(np.mean(want.high))
            assert got["low_delta_loss"] == pytest.approx(np.mean(want.low))
            assert got["mean_difference"] == pytest.approx(np.mean(np.subtract(want.high, want.low)))
            assert got["d"] == pytest.approx(test.cohens_d)
            for name in (
                "standard_error", "d_standard_error", "t", "df", "p_t", "p_wilcoxon", "t_plain", "p_t_plain",
                "p_wilcoxon_plain", "rank_biserial", "bayes_factor", "log_bayes_factor", "p_tost", "n_effective",
                "detectable_d", "n_zero",
            ):  # fmt: skip
                assert got[name] == pytest.approx(getattr(test, name)), name
            if metric == "routing_weight":
                rho = stats.spearmanr(want.ratio, np.subtract(want.high, want.low)).statistic
                assert got["rho"] == pytest.approx(rho)
            else:
                assert np.isnan(got["rho"])
            for name, expected in beyond_of(positions, value).items():
                assert got[name] == pytest.approx(expected, abs=1e-12), (metric, name)
    assert min(dropped.values()) > 10


# ---- metrics against each other ----


@pytest.mark.parametrize("k", [2, 4, 5])
def test_odds_are_those_of_the_loops(k: int) -> None:
    def delta(rows: Rows, rng: np.random.Generator) -> np.ndarray:
        return 0.4 * COARSE[rows["expert"]] + rng.normal() + rng.normal(size=len(rows["rank"]))

    census = census_of(k=k, delta=delta)
    table = claiming_low(table_of(fine=FINE, coarse=COARSE, holes=HOLES, flat=1.0, low=COARSE), "low")
    found = audit(census, table)
    rows_of_layers = []
    for layer in (1, 4):
        positions = positions_of(census.to_pandas(), layer)
        values = {
            name: lambda row, name=name: (
                (-1 if name == "low" else 1)
                * float(table.values[name][table.layers.index(row.layer), row.expert])
            )
            for name in table.metrics
        }
        # Each control is against the empty model alone.
        wanted = {("metrics", name): line for name, line in odds_of(positions, values).items()}
        for name in CONTROLS:
            alone = odds_of(positions, {name: lambda row, name=name: float(getattr(row, name))})
            wanted["control", name] = alone[name]
        for (family, metric), line in wanted.items():
            got = cell(found, family, metric, layer)
            assert {name: got[name] for name in line} == pytest.approx(line, abs=1e-12), (family, metric)
            assert len(line) == 8
            rows_of_layers.append(got["n_odds_rows"] / k / got["n_positions"])
        flat = cell(found, "metrics", "flat", layer)
        n_effective = flat["n_odds_rows"] / flat["odds_design_effect"]
        assert flat["log_odds"] == pytest.approx(-np.log(n_effective) / 2)
        assert flat["posterior"] < flat["posterior_empty"]
    # The metric with holes costs all metrics its positions, and the controls none.
    assert max(rows_of_layers) == 1
    assert 0 < min(rows_of_layers) < 0.9
    odds = found.odds()
    assert odds.index.tolist() == [
        ("metrics", "empty"), *(("metrics", name) for name in table.metrics), *(("control", c) for c in CONTROLS),
    ]  # fmt: skip
    assert odds.columns.tolist() == [1, 4]
    assert odds.loc["metrics"].sum().tolist() == pytest.approx([1, 1])
    assert odds.loc[("metrics", "coarse"), 4] == cell(found, "metrics", "coarse", 4)["posterior"]
    assert odds.loc[("metrics", "empty"), 1] == cell(found, "metrics", "coarse", 1)["posterior_empty"]
    assert odds.loc[("control", "first_order"), 1] == cell(found, "control", "first_order", 1)["posterior"]


@pytest.mark.parametrize("k", [2, 3, 8])
def test_ranks_by_slot_are_those_within_tokens(k: int) -> None:
    values = np.random.default_rng(k).integers(0, 5, (k, 200)).astype(float)
    token = np.broadcast_to(np.arange(200), values.shape)
    want = within_token_rank(values.ravel(), token.ravel())
    assert (within_position_rank(values).ravel() == want).all()
    assert np.ptp(want) == 1


def test_the_true_metric_has_the_odds_at_its_layer() -> None:
    """The two layers are unlike, so that values of the other one are no truth."""
    importance = np.random.default_rng(5).normal(size=(2, N_EXPERTS))

    def delta(rows: Rows, rng: np.random.Generator) -> np.ndarray:
        truth = importance[(rows["layer"] == 4).astype(int), rows["expert"]]
        return truth + rng.normal(size=len(rows["rank"])) + rng.normal()

    table = table_of(true=importance, swapped=importance[::-1], mixed=importance[:, ::-1])
    found = audit(census_of(60, length=20, delta=delta), table, controls="gap_norm")
    assert (found.odds().loc[("metrics", "true")] > 0.99).all()
    assert (found.odds().loc[("control", "gap_norm")] < 0.2).all()
    assert (found.cells.query("metric == 'true'")["rank_slope"] > 0).all()
    nothing = audit(census_of(60, length=20), table, controls=())
    assert (nothing.odds().loc[("metrics", "empty")] > 0.5).all()


def test_a_layer_that_cannot_be_compared() -> None:
    columns = ["rank_slope", "rank_slope_standard_error", "rank_r_squared", "log_odds", "posterior"]
    columns += ["posterior_empty", "odds_design_effect"]
    of_one = audit(census_of(1, length=20), table_of(fine=FINE)).cells
    assert of_one[columns].isna().all(axis=None)
    assert (of_one["n_odds_rows"] == 4 * of_one["n_positions"]).all()
    assert of_one["d"].notna().all()
    # A metric without a value anywhere leaves no rows for the others; the controls have theirs.
    nowhere = audit(census_of(), table_of(fine=FINE, nowhere=np.nan)).cells
    metrics, controls = (nowhere[nowhere["family"] == of] for of in ("metrics", "control"))
    assert metrics[columns].isna().all(axis=None)
    assert (metrics["n_odds_rows"] == 0).all()
    assert controls[columns].notna().all(axis=None)
    assert audit(census_of(), None).odds().index.tolist() == [("control", name) for name in CONTROLS]


def test_a_sampled_comparison_is_of_one_sample() -> None:
    census = census_of(40)
    found = audit(census, table_of(fine=FINE, twin=FINE, less=-FINE), n=30)
    fine, twin, less = (cell(found, "metrics", name, 4) for name in ("fine", "twin", "less"))
    assert fine["n_odds_rows"] == 30 * 4
    assert fine["d"] != twin["d"]
    for name in ("rank_slope", "rank_r_squared", "log_odds", "posterior"):
        assert fine[name] == twin[name]
    assert less["rank_slope"] == pytest.approx(-fine["rank_slope"])
    assert less["posterior"] == pytest.approx(fine["posterior"])
    other = audit(census, table_of(fine=FINE), n=30, seed=1)
    assert cell(other, "metrics", "fine", 4)["rank_slope"] != fine["rank_slope"]


def test_infinite_weight_ratios_are_the_largest() -> None:
    census = census_of(k=4, seed=2)
    routed = census.to_pandas().query("rank > 0")
    assert (routed["routing_weight"] == 0).sum() > 3
    want = pairs_of(positions_of(census.to_pandas(), 1), lambda row: float(row.routing_weight))
    assert np.isinf(want.ratio).any()
    got = cell(audit(census, None), "control", "routing_weight", 1)["rho"]
    assert got == pytest.approx(stats.spearmanr(want.ratio, np.subtract(want.high, want.low)).statistic)


def test_only_the_order_of_a_metric_matters_and_its_direction() -> None:
    census = census_of()
    found = audit(census, table_of(fine=FINE, more=np.exp(FINE), less=-FINE))
    fine, more, less = (cell(found, "metrics", name, 4) for name in ("fine", "more", "less"))
    assert {**fine, "metric": "more"} == pytest.approx(more, nan_ok=True)
    assert fine["d"] != 0
    for name in ("d", "t", "spearman", "kendall", "rank_biserial", "t_plain"):
        assert less[name] == pytest.approx(-fine[name])
    assert (less["d_low"], less["d_high"]) == pytest.approx((-fine["d_high"], -fine["d_low"]))


def test_shared_experts_are_left_out() -> None:
    def delta(rows: Rows, rng: np.random.Generator) -> np.ndarray:
        return np.where(rows["rank"] == 0, 1e6, rows["first_order"])

    got = audit(census_of(delta=delta), table_of(fine=FINE)).cells
    assert got[["high_delta_loss", "low_delta_loss", "random_delta_loss"]].abs().to_numpy().max() < 10


# ---- families ----


def test_families() -> None:
    census, table = census_of(60), table_of(fine=FINE, coarse=COARSE, holes=HOLES)
    cells = audit(census, table, controls=("routing_weight", "first_order", "gap_norm")).cells
    assert cells["family"].tolist() == ["metrics"] * 6 + ["control"] * 6
    families = [slice(0, 6), slice(6, 8), slice(8, 10), slice(10, 12)]
    for rows in families:
        of = cells.iloc[rows]
        n = len(of)
        assert (of["n_family"] == n).all()
        for name, p, method in (
            ("p_t_holm", "p_t", "holm"),
            ("p_wilcoxon_holm", "p_wilcoxon", "holm"),
            ("p_bh", "p_t", "fdr_bh"),
            ("p_t_bonferroni", "p_t", "bonferroni"),
            ("p_t_plain_bonferroni", "p_t_plain", "bonferroni"),
            ("p_tost_holm", "p_tost", "holm"),
        ):
            want = multipletests(of[p], method=method)[1]
            np.testing.assert_allclose(of[name], want, err_msg=name)


def test_a_metric_that_cannot_be_tested_counts_in_its_family() -> None:
    def delta(rows: Rows, rng: np.random.Generator) -> np.ndarray:
        return FINE[0][rows["expert"]] + 3 * rng.normal(size=len(rows["rank"]))

    census = census_of(delta=delta)
    flat, alone = (audit(census, table_of(**m)) for m in ({"fine": FINE, "flat": 1.0}, {"fine": FINE}))
    got = cell(flat, "metrics", "flat", 1)
    assert (got["n_pairs"], got["n_ties"], got["n_family"]) == (0, got["n_positions"], 4)
    assert got["verdict"] == "inconclusive"
    assert np.isnan([got[name] for name in ("d", "p_t", "p_t_holm", "p_tost", "spearman")]).all()
    assert (got["pruning_gain"], got["pruning_gain_standard_error"]) == (0, 0)
    assert got["lowest_delta_loss"] == pytest.approx(got["random_delta_loss"])
    p = [cell(alone, "metrics", "fine", layer)["p_t"] for layer in (1, 4)]
    assert min(p) < 0.25  # or all corrections were 1
    for name, method in (("p_t_holm", "holm"), ("p_bh", "fdr_bh"), ("p_t_bonferroni", "bonferroni")):
        want = multipletests([*p, 1.0, 1.0], method=method)[1][:2]
        corrected = [cell(flat, "metrics", "fine", layer)[name] for layer in (1, 4)]
        np.testing.assert_allclose(corrected, want)
    nowhere = audit(census, table_of(nowhere=np.nan))
    got = cell(nowhere, "metrics", "nowhere", 1)
    assert (got["n_undefined"], got["n_ties"], got["n_pairs"]) == (got["n_positions"], 0, 0)
    assert np.isnan(got["pruning_gain"])


# ---- planted truths ----


def test_planted_truth() -> None:
    importance = np.random.default_rng(5).normal(size=N_EXPERTS)

    def delta(rows: Rows, rng: np.random.Generator) -> np.ndarray:
        return importance[rows["expert"]] + rng.normal(size=len(rows["rank"])) + rng.normal()

    census = census_of(200, length=40, delta=delta)
    # Half of the experts in the order of their importance and half against it: nothing, on the whole.
    order = np.argsort(importance)
    mixed = np.empty(N_EXPERTS)
    mixed[order] = np.random.default_rng(1).permutation(N_EXPERTS)
    found = audit(census, table_of(true=importance, wrong=-importance, mixed=mixed))
    verdicts = found.verdicts()
    assert (verdicts.loc[("metrics", "true")] == "valid").all()
    assert (verdicts.loc[("metrics", "wrong")] == "inverted").all()
    assert verdicts.loc[("control", "routing_weight"), 1] == "equivalent"
    true, wrong = cell(found, "metrics", "true", 1), cell(found, "metrics", "wrong", 1)
    assert true["spearman"] > 20 * true["spearman_standard_error"]
    assert true["kendall"] > 20 * true["kendall_standard_error"]
    assert true["pruning_gain"] > 20 * true["pruning_gain_standard_error"]
    assert wrong["pruning_gain"] < 0
    assert true["best_delta_loss"] < true["lowest_delta_loss"] < true["random_delta_loss"]


def test_few_documents_and_many_cells_disagree_nowhere() -> None:
    """With 8 documents the p of ranks is at least 2^-7, which 6 cells leave significant and 8 do not."""
    importance = np.random.default_rng(5).normal(size=N_EXPERTS)

    def delta(rows: Rows, rng: np.random.Generator) -> np.ndarray:
        return importance[rows["expert"]] + 0.3 * rng.normal(size=len(rows["rank"]))

    census = census_of(8, length=40, delta=delta)
    for n_metrics, want in ((3, "valid"), (4, "inconclusive")):
        metrics = {f"metric{i}": (i + 1) * importance for i in range(n_metrics)}
        found = audit(census, table_of(**metrics), controls=()).cells
        assert (found["p_t_holm"] < 1e-3).all()
        assert (found["n_family"] == 2 * n_metrics).all()
        assert (found["verdict"] == want).all()


def test_a_metric_is_audited_as_it_claims() -> None:
    """The negative of the truth, which says so, is valid; the truth that claims to be the negative is inverted."""
    importance = np.random.default_rng(5).normal(size=N_EXPERTS)

    def delta(rows: Rows, rng: np.random.Generator) -> np.ndarray:
        return importance[rows["expert"]] + rng.normal(size=len(rows["rank"])) + rng.normal()

    table = claiming_low(
        table_of(true=importance, negative=-importance, mistaken=importance), "negative", "mistaken"
    )
    found = audit(census_of(60, length=20, delta=delta), table)
    verdicts = found.verdicts()
    assert (verdicts.loc[("metrics", "negative")] == "valid").all()
    assert (verdicts.loc[("metrics", "mistaken")] == "inverted").all()
    true, negative, mistaken = (cell(found, "metrics", name, 4) for name in table.metrics)
    same = {**true, "metric": "negative", "higher_is_more_important": False}
    assert same == pytest.approx(negative, nan_ok=True)
    assert true["pruning_gain"] > 0 > mistaken["pruning_gain"]
    assert mistaken["lowest_delta_loss"] > mistaken["random_delta_loss"] > negative["lowest_delta_loss"]
    for name in ("d", "t", "spearman", "kendall", "rank_slope"):
        assert mistaken[name] == pytest.approx(-true[name]), name
    cells = found.cells
    assert cells.columns.tolist()[5:8] == ["metric", "higher_is_more_important", "layer"]
    assert cells["higher_is_more_important"].dtype == bool
    assert cells.loc[cells["family"] == "control", "higher_is_more_important"].all()
    # A sample is of the same positions, whichever way they are ranked.
    one, other = (
        audit(census_of(60), claiming_low(table_of(fine=FINE), *names), n=30, controls=())
        for names in ((), ("fine",))
    )
    assert (one.cells["d"] == -other.cells["d"]).all()


def test_a_metric_shuffled_at_every_token_is_equivalent() -> None:
    """Importance is drawn anew for each token's experts, so no value of an expert can tell."""

    def delta(rows: Rows, rng: np.random.Generator) -> np.ndarray:
        return rng.normal(size=len(rows["rank"])) + rng.normal()

    many, few = (audit(census_of(n, length=20, delta=delta), table_of(fine=FINE)) for n in (200, 4))
    assert (many.cells["verdict"] == "equivalent").all()
    assert (few.cells["verdict"] == "inconclusive").all()
    assert (many.cells["spearman"].abs() < 4 * many.cells["spearman_standard_error"]).all()


def test_the_smallest_effect_and_alpha_are_passed_on() -> None:
    census, table = census_of(60), table_of(fine=FINE)
    usual, wide = audit(census, table), audit(census, table, smallest_effect=0.9, alpha=0.2)
    assert (wide.cells["p_tost"] < usual.cells["p_tost"]).all()
    assert (wide.cells["d_high"] < usual.cells["d_high"]).all()
    assert (wide.cells["detectable_d"] < usual.cells["detectable_d"]).all()
    assert (wide.cells["verdict"] == "equivalent").all()
    lenient = audit(census, table, alpha=0.9)
    assert usual.cells["p_tost"].tolist() == lenient.cells["p_tost"].tolist()
    changed = usual.cells["p_tost"].between(0.06, 0.89)
    assert changed.any()
    assert (lenient.cells["verdict"][changed] == "equivalent").all()
    assert (usual.cells["verdict"][changed] != "equivalent").all()


def test_losses_that_do_not_change() -> None:
    census = census_of(delta=lambda rows, rng: np.zeros(len(rows["rank"])))
    got = cell(audit(census, table_of(fine=FINE)), "metrics", "fine", 1)
    assert (got["d"], got["p_t"], got["p_wilcoxon"], got["pruning_gain"]) == (0, 1, 1, 0)
    assert got["n_zero"] == got["n_pairs"] > 0
    assert got["n_correlations"] == 0
    assert np.isnan(cell(audit(census, None), "control", "routing_weight", 1)["rho"])


# ---- samples ----


def test_samples_are_of_the_cell_alone() -> None:
    census = census_of(40)
    both = audit(census, table_of(fine=FINE, coarse=COARSE), n=30)
    one = audit(census, table_of(fine=FINE), n=30, layers=4, controls=())
    same = [name for name in both.cells if name not in ("n_family", "verdict") and "_holm" not in name]
    same = [name for name in same if "bonferroni" not in name and name != "p_bh"]
    # Odds are of all that are compared, though the rows are the same.
    same = [
        name for name in same if "posterior" not in name and name not in ("log_odds", "odds_design_effect")
    ]
    a, b = cell(both, "metrics", "fine", 4), cell(one, "metrics", "fine", 4)
    assert {name: a[name] for name in same} == pytest.approx({name: b[name] for name in same}, nan_ok=True)
    assert (both.cells["n_positions"] == 30).all()
    # Each cell has its own: metrics that order alike differ, and so do seeds.
    twins = audit(census, table_of(fine=FINE, twin=FINE), n=30)
    assert cell(twins, "metrics", "fine", 4)["d"] != cell(twins, "metrics", "twin", 4)["d"]
    assert cell(audit(census, table_of(fine=FINE), n=30, seed=1), "metrics", "fine", 4)["d"] != a["d"]


def test_a_sample_of_all_is_all() -> None:
    census, table = census_of(), table_of(fine=FINE)
    n = int(cell(audit(census, table), "metrics", "fine", 1)["n_positions"])
    pd.testing.assert_frame_equal(audit(census, table, n=n).cells, audit(census, table).cells)
    with pytest.raises(ValueError, match=rf"n={n + 1} positions .* has {n} at layer 1"):
        audit(census, table, n=n + 1)


# ---- what is refused ----


def with_provenance(table: MetricTable, **more: Any) -> MetricTable:
    return dataclasses.replace(table, provenance={**table.provenance, **more})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"metrics": ("fine", "fien")}, "has no fien; it has fine"),
        ({"metrics": ("fine", "fine")}, "once each"),
        ({"layers": (1, 2)}, "census has no layer 2; it is of layers 1, 4"),
        ({"layers": ()}, "no layer"),
        ({"controls": "kl"}, "kl is no predictor .* routing_weight, gap_norm, first_order$"),
        ({"controls": "loss"}, "loss is no predictor"),
        ({"controls": "delta_loss"}, "delta_loss is no predictor"),
        ({"compare": 3}, "compare=3 needs 6 active routed experts, and layer 1 has 4"),
        ({"compare": 0}, "compare=0 must be positive"),
        ({"n": 0}, "n=0 must be positive"),
        ({"alpha": 1.0}, "alpha"),
        ({"smallest_effect": 0.0}, "smallest_effect"),
        ({"metrics": (), "controls": ()}, "neither a metric nor a control"),
    ],
)
def test_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        audit(census_of(3), table_of(fine=FINE), **how)


def test_no_metric_is_called_as_the_empty_model() -> None:
    table = table_of(fine=FINE, empty=COARSE)
    with pytest.raises(ValueError, match="'empty' is the model without a metric"):
        audit(census_of(3), table)
    assert audit(census_of(3), table, metrics="fine").cells["metric"].iloc[0] == "fine"


def test_tables_that_do_not_belong_together() -> None:
    census, table = census_of(3), table_of(fine=FINE)
    with pytest.raises(ValueError, match=r"census is of tiny .*bfloat16|metrics are of tiny .*bfloat16"):
        audit(census, with_provenance(table, weights="0" * 64, dtype="bfloat16"))
    with pytest.raises(ValueError, match="metric table does not say of which weights"):
        audit(census, with_provenance(table, weights=None))
    with pytest.raises(ValueError, match=r"hooks edited at blocks\.1\.mlp"):
        audit(census, with_provenance(table, edited=["blocks.1.mlp"]))
    with pytest.raises(ValueError, match=r"metric table has no layer 4; it is of layers 1; layers= chooses"):
        audit(census, table_of((1,), fine=FINE[:1]))
    assert audit(census, table_of((1,), fine=FINE[:1]), layers=1).cells["layer"].unique().tolist() == [1]
    small = dataclasses.replace(
        table, values={"fine": FINE[:, :3]}, standard_errors={"fine": FINE[:, :3]}, counts=table.counts[:, :3]
    )
    with pytest.raises(ValueError, match="the metric table 3 experts"):
        audit(census, small)


def test_positions_with_unlike_numbers_of_experts() -> None:
    columns = {
        "position": [0, 0, 1, 1, 2], "layer": [1] * 5, "expert": [0, 1, 0, 1, 0], "rank": [1, 2, 1, 2, 1],
    }  # fmt: skip
    rows = {name: np.array(values) for name, values in columns.items()}
    for name in ("routing_weight", "gap_norm", "loss", "delta_loss"):
        rows[name] = np.ones(5, np.float32)
    with CensusWriter(None, IDENTITY, extra=[]) as writer:
        writer.add_document(0, rows)
        census = writer.finish({})
    with pytest.raises(
        ValueError, match=r"position 2 of document 0 has 1 active routed experts at layer 1, .* 2"
    ):
        audit(census, None)


# ---- the result ----


def test_result(tmp_path: Path) -> None:
    census = census_of(identity={**IDENTITY, "scope": "sequence", "how": "mean"})
    table = with_provenance(table_of(fine=FINE), as_released="olmoe", fingerprint="other")
    found = audit(census, table, n=20)
    assert (found.cells["scope"] == "sequence").all()
    assert (found.cells["how"] == "mean").all()
    assert (found.cells["as_released"] == "olmoe").all()
    assert "scope sequence, mean, 20 positions a cell" in repr(found)
    assert "tiny: 6 cells" in repr(found)
    assert found.provenance["same_corpus"] is False
    assert found.provenance["census"]["seconds"] == 1.0
    assert found.provenance["metric_table"]["n_tokens"] == 100
    assert found.verdicts().index.tolist() == [("metrics", "fine"), *(("control", name) for name in CONTROLS)]
    assert found.verdicts().columns.tolist() == [1, 4]

    path = found.save(tmp_path / "audit.parquet")
    again = Audit.load(path)
    pd.testing.assert_frame_equal(again.cells, found.cells)
    assert again.provenance == found.provenance
    assert repr(again) == repr(found)
    copy = found.to_frame()
    copy["d"] = 0.0
    assert (found.cells["d"] != 0).all()


def test_files_that_are_no_audit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Audit.load(tmp_path / "audit.parquet")
    (tmp_path / "text").write_text("no")
    with pytest.raises(ValueError, match="text is no file of an audit"):
        Audit.load(tmp_path / "text")
    pq.write_table(pa.table({"d": [1.0]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other\.parquet is no file of an audit"):
        Audit.load(tmp_path / "other.parquet")
    with pytest.raises(FileNotFoundError, match="no folder"):
        audit(census_of(3), None).save(tmp_path / "none" / "audit.parquet")


# ---- a model ----


@pytest.mark.slow
def test_first_order_is_strongly_positive_on_the_bundled_model() -> None:
    from moe_lens import HookedMoE
    from moe_lens.audit import census
    from moe_lens.audit.metrics import PAPER_METRICS, expert_metrics
    from moe_lens.corpus import bundled_documents

    model = HookedMoE.from_pretrained("mini", dtype=torch.float32, device="cpu", verbose=False)
    texts = [document.text[:400] for document in bundled_documents(demo_only=True)[:12]]
    layers = model.cfg.moe_layers[1:3]
    table = expert_metrics(model, texts, metrics=PAPER_METRICS, layers=layers)
    found = audit(census(model, texts, layers=layers, predictors="first_order", n=400), table)
    assert found.provenance["same_corpus"] is True
    assert len(found.cells) == (4 + 2) * 2
    for layer in layers:
        got = cell(found, "control", "first_order", layer)
        assert got["n_ties"] == got["n_undefined"] == 0
        assert got["verdict"] == "valid"
        assert got["d"] > 0.3
        assert got["spearman"] > 0.5
        assert got["pruning_gain"] > 0
        assert got["best_delta_loss"] <= got["lowest_delta_loss"]
