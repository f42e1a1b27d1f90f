"""How often the tests of the audit are right, where the truth is known: positions of documents that go together."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from moe_lens.audit.statistics import PairedTest, benjamini_hochberg, detectable_d, holm, paired_test

pytestmark = pytest.mark.filterwarnings("error")
N_DOCUMENTS, LENGTH, CORRELATION = 40, 25, 0.1
DOCUMENT = np.repeat(np.arange(N_DOCUMENTS), LENGTH)


def differences(
    n_runs: int,
    *,
    seed: int,
    d: float = 0.0,
    n_documents: int = N_DOCUMENTS,
    length: int = LENGTH,
    correlation: float = CORRELATION,
    skewed: bool = False,
) -> np.ndarray:
    """[run, pair], of standard deviation 1 and mean d, documents of equal length one after the other."""
    rng = np.random.default_rng(seed)
    shared = np.repeat(rng.normal(size=(n_runs, n_documents)), length, axis=1)
    own = (
        (rng.gamma(0.25, size=shared.shape) - 0.25) / 0.5
        if skewed
        else rng.standard_t(6, size=shared.shape) / math.sqrt(1.5)
    )
    return math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own + d


def found_in(runs: np.ndarray, cluster: np.ndarray = DOCUMENT) -> list[PairedTest]:
    zero = np.zeros(runs.shape[1])
    return [paired_test(x, zero, cluster) for x in runs]


def rate(tests: list[PairedTest], name: str, alpha: float = 0.05) -> float:
    return float(np.mean([getattr(test, name) <= alpha for test in tests]))


@pytest.fixture(scope="module")
def null() -> list[PairedTest]:
    return found_in(differences(1000, seed=1))


def test_false_positives_under_dependence(null: list[PairedTest]) -> None:
    assert 0.03 <= rate(null, "p_t") <= 0.08
    assert 0.03 <= rate(null, "p_wilcoxon") <= 0.08
    assert rate(null, "p_t_plain") > 0.2
    assert rate(null, "p_wilcoxon_plain") > 0.2


def test_interval_of_d_and_effective_pairs_under_dependence(null: list[PairedTest]) -> None:
    """The design effect of documents of m pairs with intraclass correlation r is 1 + (m - 1) r (Kish 1965)."""
    coverage = np.mean([test.d_ci[0] <= 0 <= test.d_ci[1] for test in null])
    assert 0.93 <= coverage <= 0.97
    expected = N_DOCUMENTS * LENGTH / (1 + (LENGTH - 1) * CORRELATION)
    assert np.median([test.n_effective for test in null]) == pytest.approx(expected, rel=0.1)
    # Bayes factors favour the truth, and seldom speak strongly against it.
    factors = np.array([test.bayes_factor for test in null])
    assert np.median(factors) < 1 / 3
    assert np.mean(factors > 10) < 0.01


def test_few_documents_by_exact_signed_ranks() -> None:
    tests = found_in(differences(600, seed=2, n_documents=10), np.repeat(np.arange(10), LENGTH))
    assert 0.025 <= rate(tests, "p_wilcoxon") <= 0.08
    assert 0.025 <= rate(tests, "p_t") <= 0.08
    assert rate(tests, "p_wilcoxon_plain") > 0.2


def test_an_effect_is_found_as_often_as_said() -> None:
    n_effective = N_DOCUMENTS * LENGTH / (1 + (LENGTH - 1) * CORRELATION)
    d = detectable_d(n_effective, N_DOCUMENTS - 1)
    tests = found_in(differences(600, seed=3, d=d))
    assert 0.74 <= rate(tests, "p_t") <= 0.86
    assert np.median([test.detectable_d for test in tests]) == pytest.approx(d, rel=0.05)
    assert rate(found_in(differences(200, seed=4, d=2 * d)), "p_wilcoxon") > 0.98


@pytest.mark.parametrize("d", [-0.5, 0.5])
def test_interval_of_d_where_differences_are_skewed(d: float) -> None:
    tests = found_in(differences(1000, seed=5, d=d, skewed=True))
    assert 0.925 <= np.mean([test.d_ci[0] <= d <= test.d_ci[1] for test in tests]) <= 0.975
    # An interval that took the standard deviation for known would be too narrow where skew and effect are opposed.
    naive = [
        abs(test.cohens_d - d) <= stats.t.ppf(0.975, test.df) / math.sqrt(test.n_effective) for test in tests
    ]
    assert d > 0 or np.mean(naive) < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("skewed", [False, True])
def test_equivalence_is_claimed_falsely_at_most_as_often_as_said(skewed: bool) -> None:
    how = {"n_documents": 40, "length": 75, "correlation": 0.02, "skewed": skewed}
    cluster = np.repeat(np.arange(40), 75)
    for d in (-0.1, 0.1):
        claimed = rate(found_in(differences(600, seed=6, d=d, **how), cluster), "p_tost")
        assert 0.02 <= claimed <= 0.08
    # And truly where there is nothing.
    assert rate(found_in(differences(200, seed=7, **how), cluster), "p_tost") > 0.7


def test_families_with_a_false_rejection() -> None:
    """20 cells, half of them with a clear effect, tests dependent: Holm keeps any false rejection rare; Benjamini and
    Hochberg's promise is of their share."""
    rng = np.random.default_rng(8)
    n_runs, n_null = 2000, 10
    shared = rng.normal(size=(n_runs, 1))
    z = math.sqrt(0.3) * shared + math.sqrt(0.7) * rng.normal(size=(n_runs, 2 * n_null))
    z[:, n_null:] += 6
    p = 2 * stats.norm.sf(np.abs(z))
    by_holm = np.array([holm(family) for family in p]) <= 0.05
    by_bh = np.array([benjamini_hochberg(family) for family in p]) <= 0.05
    assert 0.02 <= by_holm[:, :n_null].any(axis=1).mean() <= 0.06
    assert by_bh[:, :n_null].any(axis=1).mean() > 0.1
    assert (by_bh[:, :n_null].sum(axis=1) / np.maximum(by_bh.sum(axis=1), 1)).mean() <= 0.05
    assert (p[:, :n_null] <= 0.05).any(axis=1).mean() > 0.25
    assert by_holm[:, n_null:].mean() > 0.99
