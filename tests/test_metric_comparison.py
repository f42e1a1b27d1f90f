"""Posterior odds over metrics: beside regressions with a column per document, and where the truth is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moe_lens.audit.statistics import compare_metrics, within_token_rank

pytestmark = pytest.mark.filterwarnings("error")
Layer = tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]


def layer(n_documents: int = 30, length: int = 20, k: int = 4, seed: int = 0, n_metrics: int = 3) -> Layer:
    """Ranks by random metrics, documents and, for each document, an effect."""
    rng = np.random.default_rng(seed)
    token = np.repeat(np.arange(n_documents * length), k)
    ranks = {f"m{i}": within_token_rank(rng.normal(size=len(token)), token) for i in range(n_metrics)}
    document = token // length
    return ranks, document, rng.normal(size=n_documents)[document]


# ---- ranks ----


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(-3, 3)), min_size=1, max_size=40))
def test_ranks_within_tokens(rows: list[tuple[int, int]]) -> None:
    token, values = np.array(rows).T
    ranks = within_token_rank(values, token)
    for one in np.unique(token):
        here = token == one
        k = here.sum()
        want = (stats.rankdata(values[here]) - (k + 1) / 2) / max(k - 1, 1)
        assert ranks[here] == pytest.approx(want)


def test_ranks_run_from_minus_half_to_half() -> None:
    assert within_token_rank([5.0, 1.0, 3.0, 9.0, 9.0, 2.0], [0, 0, 0, 1, 1, 2]).tolist() == [
        0.5,
        -0.5,
        0.0,
        0.0,
        0.0,
        0.0,
    ]
    assert within_token_rank([], []).shape == (0,)
    with pytest.raises(ValueError, match="NaN at row 1"):
        within_token_rank([1.0, math.nan], [0, 0])
    with pytest.raises(ValueError, match="one per row"):
        within_token_rank([1.0], [0, 0])


# ---- beside statsmodels ----


def test_regressions_and_bic_are_statsmodels() -> None:
    ranks, document, effect = layer(12, 6)
    rng = np.random.default_rng(1)
    loss = effect + 0.8 * ranks["m1"] + rng.normal(size=len(effect))
    found = compare_metrics(loss, ranks, document)
    table = found.table.set_index("metric")
    dummies = (document[:, None] == np.arange(12)).astype(float)
    empty = sm.OLS(loss, dummies).fit()
    design_effects = []
    for name, rank in ranks.items():
        fit = sm.OLS(loss, np.column_stack([rank, dummies])).fit()
        line = table.loc[name]
        assert line["slope"] == pytest.approx(fit.params[0])
        # BIC counts a parameter per column, and both models have the documents'.
        assert line["log_bayes_factor_independent"] == pytest.approx((empty.bic - fit.bic) / 2)
        assert line["r_squared"] == pytest.approx(1 - fit.ssr / empty.ssr)
        clustered = fit.get_robustcov_results(
            "cluster", groups=document, use_correction=True, df_correction=True
        )
        # statsmodels counts the documents' columns in its small-sample correction; they lie within the clusters.
        n, columns = len(loss), 13
        error = clustered.bse[0] * math.sqrt((n - columns) / (n - 1))
        assert line["standard_error"] == pytest.approx(error)
        design_effects.append(error**2 / fit.bse[0] ** 2)
    assert found.design_effect == pytest.approx(max(1.0, *design_effects))
    assert found.n_effective == pytest.approx(len(loss) / found.design_effect)
    assert (found.n_rows, found.n_documents) == (len(loss), 12)
    n = found.n_effective
    want = [0.0] + [
        -n / 2 * math.log(1 - r2) - math.log(n) / 2 for r2 in table["r_squared"].drop("empty").tolist()
    ]
    assert table["log_bayes_factor"].tolist() == pytest.approx(want)
    assert table["posterior"].sum() == pytest.approx(1)
    odds = table["posterior"] / table["posterior"]["empty"]
    assert np.log(odds).tolist() == pytest.approx(want)


# ---- where the truth is known ----


def test_the_true_metric_is_found() -> None:
    ranks, document, effect = layer(40, 25)
    rng = np.random.default_rng(2)
    table = compare_metrics(effect + 0.3 * ranks["m2"] + rng.normal(size=len(effect)), ranks, document).table
    assert table["metric"].tolist() == ["empty", "m0", "m1", "m2"]
    assert table["posterior"].iloc[3] > 0.99
    # One that ranks nearly like the truth comes second.
    noisy = ranks | {"m1": ranks["m2"] + 0.3 * ranks["m1"]}
    table = compare_metrics(effect + 0.3 * ranks["m2"] + rng.normal(size=len(effect)), noisy, document).table
    assert table["log_bayes_factor"].iloc[3] > table["log_bayes_factor"].iloc[2] > 5


def test_nothing_is_found_where_there_is_nothing() -> None:
    posteriors = []
    for seed in range(100):
        ranks, document, effect = layer(seed=seed)
        loss = effect + np.random.default_rng(seed + 1000).standard_t(5, size=len(effect))
        posteriors.append(compare_metrics(loss, ranks, document).table["posterior"].iloc[0])
    assert np.median(posteriors) > 0.85
    assert np.mean(np.array(posteriors) < 0.5) < 0.06


def test_slopes_that_differ_between_documents_are_no_evidence() -> None:
    """A metric that helps in some documents and misleads in as many: rows taken for independent claim an effect."""
    tempered, independent = [], []
    for seed in range(100):
        ranks, document, effect = layer(20, 50, seed=seed, n_metrics=1)
        rng = np.random.default_rng(seed + 1000)
        slopes = rng.normal(size=20)[document]
        loss = effect + slopes * ranks["m0"] + rng.normal(size=len(effect))
        found = compare_metrics(loss, ranks, document)
        assert found.design_effect > 3
        tempered.append(found.table["log_bayes_factor"].iloc[1])
        independent.append(found.table["log_bayes_factor_independent"].iloc[1])
    assert np.mean(np.array(independent) > 3) > 0.2
    assert np.mean(np.array(tempered) > 3) < 0.05


# ---- whatever the rows ----


@pytest.mark.parametrize("factor", [1e-9, -3.0, 1e12])
def test_units_order_and_labels_do_not_matter(factor: float) -> None:
    ranks, document, effect = layer(10, 5)
    loss = effect + np.random.default_rng(3).normal(size=len(effect))
    want = compare_metrics(loss, ranks, document)
    order = np.random.default_rng(4).permutation(len(loss))
    got = compare_metrics(
        factor * loss[order],
        {name: rank[order] for name, rank in ranks.items()},
        [f"page {i}" for i in document[order]],
    )
    for name in ("r_squared", "log_bayes_factor", "posterior", "log_bayes_factor_independent"):
        assert got.table[name].to_numpy() == pytest.approx(want.table[name].to_numpy(), abs=1e-9)
    assert got.table["slope"].to_numpy() == pytest.approx(factor * want.table["slope"].to_numpy())
    assert got.design_effect == pytest.approx(want.design_effect)


def test_little_to_go_by() -> None:
    ranks, document, effect = layer(10, 5)
    n = len(effect)
    # The loss changes by the document only; so for each metric there is the charge of a slope and no gain.
    table = compare_metrics(effect, ranks, document).table
    assert table["slope"].tolist() == [0] * 4
    assert table["log_bayes_factor"].tolist() == pytest.approx([0] + [-math.log(n) / 2] * 3)
    # A metric that ties everywhere.
    loss = effect + np.random.default_rng(5).normal(size=n)
    table = compare_metrics(loss, {"tied": np.zeros(n), **ranks}, document).table.set_index("metric")
    assert table.loc["tied", "slope"] == 0
    assert table.loc["tied", "standard_error"] == math.inf
    assert table.loc["tied", "log_bayes_factor_independent"] == pytest.approx(-math.log(n) / 2)
    # A metric that leaves nothing unexplained.
    table = compare_metrics(2 * ranks["m0"] + effect, ranks, document).table
    assert table["posterior"].iloc[1] == pytest.approx(1)
    assert table["slope"].iloc[1] == pytest.approx(2)
    assert np.isfinite(table["log_bayes_factor"]).all()


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("no metric", {"ranks": {}}),
        ("'empty' is the model", {"ranks": {"empty": np.zeros(40)}}),
        ("two documents", {"document": np.zeros(40)}),
        ("more rows than documents", {"document": np.arange(40)}),
        ("m0 has one value per row", {"ranks": {"m0": np.zeros(39)}}),
        ("delta_loss is NaN or infinite at row 3", {"delta_loss": np.where(np.arange(40) == 3, np.nan, 1.0)}),
        ("m0 is NaN or infinite at row 0", {"ranks": {"m0": np.full(40, np.inf)}}),
        ("label of row 2", {"document": np.where(np.arange(40) == 2, np.nan, np.arange(40) % 5)}),
    ],
)
def test_what_cannot_be_compared(message: str, change: dict[str, Any]) -> None:
    ranks, document, effect = layer(5, 2, n_metrics=1)
    with pytest.raises(ValueError, match=message):
        compare_metrics(**{"delta_loss": effect, "ranks": ranks, "document": document, **change})
