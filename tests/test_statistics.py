"""Paired tests of the audit, beside scipy, statsmodels and what can be counted by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moe_lens.audit.signed_rank import sign_flip_p
from moe_lens.audit.statistics import (
    PairedTest,
    clustered_signed_rank,
    jzs_log_bayes_factor,
    paired_test,
)

pytestmark = pytest.mark.filterwarnings("error")


def pairs(n: int, seed: int = 0, *, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    high, low = rng.standard_t(4, size=n) + 0.3, rng.normal(size=n)
    if ties:
        high, low = np.round(high), np.round(low)
    return high, low


def numbers(test: PairedTest) -> dict[str, float]:
    found = asdict(test)
    found["d_low"], found["d_high"] = found.pop("d_ci")
    return found


def documents(n: int, n_documents: int, seed: int = 0) -> np.ndarray:
    """Of different lengths, in no order, each with at least one pair."""
    rng = np.random.default_rng(seed)
    of_rest = rng.choice(n_documents, size=n - n_documents, p=rng.dirichlet(np.full(n_documents, 3.0)))
    return rng.permutation(np.concatenate([np.arange(n_documents), of_rest]))


# ---- without documents: what scipy and statsmodels say ----


@pytest.mark.parametrize(
    ("n", "ties"), [(2, False), (7, False), (40, False), (300, False), (7, True), (40, True), (300, True)]
)
def test_plain_tests_are_scipys(n: int, ties: bool) -> None:
    high, low = pairs(n, ties=ties)
    found = paired_test(high, low)
    t, p = stats.ttest_rel(high, low)
    assert (found.t, found.t_plain) == pytest.approx((t, t), rel=1e-12)
    assert (found.p_t, found.p_t_plain) == pytest.approx((p, p), rel=1e-12)
    ranks = stats.wilcoxon(high, low, zero_method="pratt")
    assert found.p_wilcoxon == found.p_wilcoxon_plain == pytest.approx(ranks.pvalue, rel=1e-12)
    assert found.cohens_d == pytest.approx(np.mean(high - low) / np.std(high - low, ddof=1), rel=1e-12)
    assert found.mean_difference == pytest.approx(np.mean(high - low), rel=1e-12)
    assert (found.n_pairs, found.n_clusters, found.df) == (n, n, n - 1)
    assert found.n_effective == n
    assert found.design_effect == 1


def test_pairs_as_their_own_documents_change_nothing() -> None:
    high, low = pairs(200, ties=True)
    plain, clustered = paired_test(high, low), paired_test(high, low, np.arange(200))
    assert numbers(clustered) == pytest.approx(numbers(plain), rel=1e-12)


def test_published_effect_sizes_and_p_values_agree() -> None:
    """Of the published audit's tables: d and p at n = 200 are the same number told twice, t = d sqrt(n)."""
    x = np.random.default_rng(0).normal(size=200)
    x = (x - x.mean()) / x.std(ddof=1)
    for d, p, digits in (
        (0.231, 0.0013, 4),
        (0.141, 0.048, 3),
        (-0.071, 0.319, 3),
        (0.163, 0.023, 3),
        (0.222, 0.002, 3),
    ):
        # d is rounded to three digits.
        least, most = sorted(paired_test(x + d + by, 0 * x).p_t for by in (-0.0005, 0.0005))
        assert round(least, digits) <= p <= round(most, digits)


# ---- with documents ----


@pytest.mark.parametrize("n_documents", [2, 12, 60])
def test_clustered_t_is_statsmodels_regression(n_documents: int) -> None:
    high, low = pairs(400)
    cluster = documents(400, n_documents)
    found = paired_test(high, low, cluster)
    how = {"groups": cluster, "use_correction": True, "df_correction": True}
    fit = sm.OLS(high - low, np.ones(400)).fit(cov_type="cluster", cov_kwds=how, use_t=True)
    assert found.t == pytest.approx(fit.tvalues[0], rel=1e-10)
    assert found.p_t == pytest.approx(fit.pvalues[0], rel=1e-10)
    assert found.standard_error == pytest.approx(fit.bse[0], rel=1e-10)
    assert (found.n_clusters, found.df) == (n_documents, n_documents - 1)
    plain = paired_test(high, low)
    assert (found.t_plain, found.p_t_plain, found.p_wilcoxon_plain) == (
        pytest.approx(plain.t),
        pytest.approx(plain.p_t),
        pytest.approx(plain.p_wilcoxon),
    )


def signed_rank_slowly(x: np.ndarray, cluster: np.ndarray) -> tuple[dict[Any, float], float]:
    sums: dict[Any, float] = {}
    for value, label in zip(x, cluster, strict=True):
        below, equal = (np.abs(x) < abs(value)).sum(), (np.abs(x) == abs(value)).sum()
        sums[label] = sums.get(label, 0.0) + np.sign(value) * (below + (equal + 1) / 2)
    total = sum(sums.values())
    return sums, total / math.sqrt(sum(r**2 for r in sums.values()))


def test_clustered_signed_ranks_many_documents() -> None:
    high, low = pairs(300, ties=True)
    cluster = documents(300, 45)
    found = paired_test(high, low, cluster)
    sums, z = signed_rank_slowly(high - low, cluster)
    assert found.n_zero > 20
    assert sum(r != 0 for r in sums.values()) >= 30
    assert found.p_wilcoxon == pytest.approx(2 * stats.norm.sf(abs(z)), rel=1e-10)


@pytest.mark.parametrize("n_documents", [2, 5, 11])
def test_clustered_signed_ranks_few_documents(n_documents: int) -> None:
    high, low = pairs(40, n_documents, ties=True)
    cluster = documents(40, n_documents)
    sums, _ = signed_rank_slowly(high - low, cluster)
    values = np.array(list(sums.values()))
    turned = [abs(np.dot(signs, values)) for signs in itertools.product([-1, 1], repeat=n_documents)]
    share = np.mean(np.array(turned) >= abs(values.sum()))
    assert paired_test(high, low, cluster).p_wilcoxon == pytest.approx(share, rel=1e-12)


@pytest.mark.parametrize("n", [3, 14, 29])
def test_exact_signed_ranks_are_scipys_exact_test(n: int) -> None:
    x = np.random.default_rng(n).normal(0.3, size=n)
    found = clustered_signed_rank(x, np.arange(n))
    exact = stats.wilcoxon(x, method="exact").pvalue
    assert found.p == pytest.approx(exact, rel=1e-10)
    assert found.rank_biserial == pytest.approx(1 - 4 * stats.rankdata(abs(x))[x < 0].sum() / (n * (n + 1)))


@pytest.mark.parametrize("ties", [False, True])
def test_signed_ranks_by_the_normal_distribution_are_scipys(ties: bool) -> None:
    high, low = pairs(120, ties=ties)
    found = clustered_signed_rank(high - low, np.arange(120))
    scipys = stats.wilcoxon(high, low, zero_method="pratt", method="asymptotic")
    assert found.p == pytest.approx(scipys.pvalue, rel=1e-10)
    # scipy's has the sign of the smaller sum of ranks.
    assert abs(found.z) == pytest.approx(abs(scipys.zstatistic), rel=1e-10)
    assert found.z * found.rank_biserial > 0


def test_fewest_documents_for_signed_ranks() -> None:
    """With five documents even a perfect agreement has p = 1/16; with one, nothing is known."""
    for n_documents, p in ((1, 1.0), (5, 1 / 16), (6, 1 / 32)):
        assert sign_flip_p(np.arange(1, n_documents + 1)) == p


@pytest.mark.parametrize("cluster", [None, documents(150, 12)])
def test_jackknife_of_d(cluster: np.ndarray | None) -> None:
    high, low = pairs(150)
    found = paired_test(high, low, cluster, alpha=0.1)
    x = high - low
    labels = np.arange(150) if cluster is None else cluster
    without = np.array([_d(x[labels != label]) for label in np.unique(labels)])
    g = len(without)
    error = math.sqrt((g - 1) / g * np.square(without - without.mean()).sum())
    assert found.d_standard_error == pytest.approx(error, rel=1e-9)
    margin = stats.t.ppf(0.95, g - 1) * error
    assert found.d_ci == pytest.approx((_d(x) - margin, _d(x) + margin))


def _d(x: np.ndarray) -> float:
    return x.mean() / x.std(ddof=1)


def test_error_of_d_for_many_normal_pairs() -> None:
    """sqrt((1 + d^2 / 2) / n), the textbook's for independent normal differences."""
    x = np.random.default_rng(0).normal(0.8, size=40_000)
    found = paired_test(x, np.zeros(len(x)))
    assert found.d_standard_error == pytest.approx(math.sqrt((1 + 0.8**2 / 2) / len(x)), rel=0.02)


def test_effective_pairs() -> None:
    """Documents of 25 equal differences are worth one pair each; those that cancel, no more than there are."""
    x = np.repeat(np.random.default_rng(0).normal(size=40), 25)
    cluster = np.repeat(np.arange(40), 25)
    found = paired_test(x, np.zeros(1000), cluster)
    assert found.n_effective == pytest.approx(40, rel=0.03)
    assert found.design_effect == pytest.approx(25, rel=0.03)
    assert found.t_plain == pytest.approx(5 * found.t, rel=0.03)
    assert found.log_bayes_factor == pytest.approx(jzs_log_bayes_factor(found.t, found.n_effective), rel=1e-9)
    cancelling = np.tile([1.0, -1.0], 20) + np.repeat(np.linspace(-0.1, 0.1, 20), 2)
    assert paired_test(cancelling, np.zeros(40), np.repeat(np.arange(20), 2)).n_effective == 40


# ---- whatever the pairs ----

VALUES = st.one_of(st.integers(-4, 4).map(float), st.floats(-3, 3).map(lambda x: round(x, 6)))


@st.composite
def cells(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    n = draw(st.integers(2, 40))
    high, low = (np.array(draw(st.lists(VALUES, min_size=n, max_size=n))) for _ in range(2))
    cluster = np.array(draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)))
    return high, low, draw(st.sampled_from([None, cluster]))


@settings(deadline=None, max_examples=150)
@given(cells())
def test_every_result_is_defined(cell: tuple[np.ndarray, np.ndarray, np.ndarray | None]) -> None:
    found = numbers(paired_test(*cell))
    assert not any(math.isnan(value) for value in found.values())
    assert all(0 <= found[name] <= 1 for name in found if name.startswith("p_"))
    assert found["d_low"] <= found["cohens_d"] <= found["d_high"]
    assert 1 <= found["n_effective"] <= found["n_pairs"]
    assert -1 <= found["rank_biserial"] <= 1


@settings(deadline=None, max_examples=100)
@given(cells())
def test_swapping_high_and_low_turns_the_signs(
    cell: tuple[np.ndarray, np.ndarray, np.ndarray | None],
) -> None:
    high, low, cluster = cell
    found, swapped = numbers(paired_test(high, low, cluster)), numbers(paired_test(low, high, cluster))
    for name in ("mean_difference", "cohens_d", "t", "t_plain", "rank_biserial"):
        found[name] = -found[name]
    found["d_low"], found["d_high"] = -found["d_high"], -found["d_low"]
    assert swapped == pytest.approx(found, rel=1e-12, abs=1e-15)


@settings(deadline=None, max_examples=100)
@given(cells(), st.sampled_from([2.0**-900, 1e-4, 8.0, 1e150]))
def test_the_unit_does_not_matter(
    cell: tuple[np.ndarray, np.ndarray, np.ndarray | None], factor: float
) -> None:
    high, low, cluster = cell
    x = high - low
    found = numbers(paired_test(x, np.zeros_like(x), cluster))
    scaled = numbers(paired_test(x * factor, np.zeros_like(x), cluster))
    for name in ("mean_difference", "standard_error"):
        assert scaled.pop(name) == pytest.approx(found.pop(name) * factor, rel=1e-9)
    if len(np.unique(abs(x * factor))) == len(np.unique(abs(x))):
        assert scaled == pytest.approx(found, rel=1e-7, abs=1e-10)


@settings(deadline=None, max_examples=100)
@given(cells(), st.randoms(use_true_random=False))
def test_order_and_labels_do_not_matter(
    cell: tuple[np.ndarray, np.ndarray, np.ndarray | None], random: Any
) -> None:
    high, low, cluster = cell
    found = numbers(paired_test(high, low, cluster))
    order = random.sample(range(len(high)), len(high))
    names = [f"document {i}" for i in random.sample(range(10), 10)]
    labels = None if cluster is None else [names[i] for i in cluster[order]]
    other = numbers(paired_test(high[order], low[order], labels))
    assert other == pytest.approx(found, rel=1e-7, abs=1e-10)


def test_labels_of_any_kind() -> None:
    high, low = pairs(30)
    cluster = documents(30, 6)
    want = paired_test(high, low, cluster)
    for labels in (cluster.astype(str), pd.Categorical(cluster), pd.Series(cluster * 1.5), cluster.tolist()):
        found = paired_test(high.tolist(), pd.Series(low), labels)
        assert numbers(found) == pytest.approx(numbers(want))


# ---- little to go by ----


@pytest.mark.parametrize("n_documents", [None, 40])
def test_all_differences_zero(n_documents: int | None) -> None:
    n = 2000
    cluster = None if n_documents is None else np.arange(n) % n_documents
    found = paired_test(np.full(n, 0.3), np.full(n, 0.3), cluster)
    assert (found.cohens_d, found.t, found.mean_difference, found.rank_biserial) == (0, 0, 0, 0)
    assert found.p_t == found.p_wilcoxon == found.p_t_plain == found.p_wilcoxon_plain == 1
    assert (found.n_zero, found.n_effective) == (n, n)
    assert found.d_standard_error == 1 / math.sqrt(n)
    assert found.p_tost < 0.001
    assert found.bayes_factor < 0.05
    # As for differences that become small.
    signs = np.random.default_rng(0).permutation(np.tile([1e-12, -1e-12], n // 2))
    small = paired_test(signs, np.zeros(n))
    assert small.d_standard_error == pytest.approx(found.d_standard_error, rel=1e-3)
    # Too few say nothing.
    assert paired_test(np.ones(20), np.ones(20)).p_tost > 0.05


def test_all_differences_equal() -> None:
    found = paired_test(np.full(50, 2.0), np.full(50, 1.7), np.arange(50) % 7)
    assert (found.cohens_d, found.t, found.t_plain, found.bayes_factor) == (math.inf,) * 4
    assert (found.p_t, found.p_tost) == (0, 1)
    assert found.d_ci == (math.inf, math.inf)
    assert found.mean_difference == pytest.approx(0.3)
    assert found.p_wilcoxon == 2 / 2**7


def test_a_single_document() -> None:
    high, low = pairs(60)
    found, plain = paired_test(high, low, np.zeros(60)), paired_test(high, low)
    assert found.cohens_d == plain.cohens_d
    assert (found.t, found.p_t, found.p_wilcoxon, found.p_tost) == (0, 1, 1, 1)
    assert found.d_ci == (-math.inf, math.inf)
    assert (found.bayes_factor, found.n_effective, found.detectable_d) == (1, 1, math.inf)
    assert (found.p_t_plain, found.p_wilcoxon_plain) == (plain.p_t, plain.p_wilcoxon)


def test_all_that_varies_in_one_document() -> None:
    x = np.concatenate([np.ones(30), [0.9, 1.1, 1.2]])
    cluster = np.concatenate([np.arange(30) // 5, [9, 9, 9]])
    found = paired_test(x, np.zeros(33), cluster)
    assert found.d_ci == (-math.inf, math.inf)
    assert found.p_tost == 1
    # One difference among zeros leaves zeros, whose d is 0.
    x = np.zeros(1000)
    x[7] = 2
    found = paired_test(x, np.zeros(1000))
    assert found.t == pytest.approx(1)
    assert found.d_standard_error == pytest.approx(1 / math.sqrt(1000), rel=0.01)


def test_documents_whose_differences_cancel_but_for_rounding() -> None:
    a = np.random.default_rng(0).normal(size=50) / 3
    x = np.concatenate([a, a + 0.1]) - np.concatenate([a * 0, a * 2 + 0.1])
    found = paired_test(x, np.zeros(100), np.tile(np.arange(50), 2))
    assert abs(x.sum()) < 1e-12
    assert (found.t, found.p_t) == (0, 1)


NOT_PAIRS: list[tuple[str, Any, Any, Any]] = [
    ("at least two pairs, and got 1", [1.0], [0.0], None),
    ("at least two pairs, and got 0", [], [], None),
    ("low has 2 values that are NaN or infinite, the first at pair 1", [1, 2, 3], [0, math.nan, math.inf], None),
    ("2 values of high and 3 of low", [1, 2], [1, 2, 3], None),
    ("high has one value per pair", [[1, 2]], [1, 2], None),
    ("one label for each of the 2 pairs", [1, 2], [1, 3], [0]),
    ("one label for each of the 2 pairs", [1, 2], [1, 3], [[0, 1]]),
    ("label of pair 1", [1, 2], [1, 3], [0, math.nan]),
    ("label of pair 0", [1, 2], [1, 3], [None, "a"]),
    ("past floating point", [1e308, 2], [-1e308, 3], None),
]  # fmt: skip


@pytest.mark.parametrize(("message", "high", "low", "cluster"), NOT_PAIRS)
def test_what_are_no_pairs(message: str, high: Any, low: Any, cluster: Any) -> None:
    with pytest.raises(ValueError, match=message):
        paired_test(high, low, cluster)


@pytest.mark.parametrize(
    "how", [{"alpha": 0}, {"alpha": 1.0}, {"smallest_effect": 0}, {"smallest_effect": math.nan}]
)
def test_bounds_out_of_range(how: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(how))):
        paired_test([1, 2, 3], [1, 1, 1], **how)
