"""Corrections for many tests, and what a cell of the audit is called."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests

from moe_lens.audit.statistics import (
    PairedTest,
    benjamini_hochberg,
    bonferroni,
    holm,
    paired_test,
    verdict,
)

pytestmark = pytest.mark.filterwarnings("error")


def test_corrections_by_hand() -> None:
    p = [0.01, 0.04, 0.03, 0.005]
    assert holm(p).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert benjamini_hochberg(p).tolist() == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert bonferroni(p).tolist() == pytest.approx([0.04, 0.16, 0.12, 0.02])
    assert bonferroni(p, 20).tolist() == pytest.approx([0.2, 0.8, 0.6, 0.1])
    # The published audit's 0.0013 at the control's 0.05 / 5, and 0.002 at 0.05 / 20 but not through Wilcoxon.
    assert bonferroni([0.0013], 5)[0] < 0.05
    assert bonferroni([0.002, 0.036], 20).tolist() == pytest.approx([0.04, 0.72])


@pytest.fixture(scope="module")
def no_collection() -> Iterator[None]:
    """statsmodels collects garbage for every Holm correction, which takes half a second where torch is loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gc.collect", lambda: 0)
        yield


@pytest.mark.usefixtures("no_collection")
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_corrections_are_statsmodels(p: list[float]) -> None:
    for ours, theirs in ((holm, "holm"), (benjamini_hochberg, "fdr_bh"), (bonferroni, "bonferroni")):
        assert ours(p) == pytest.approx(multipletests(p, method=theirs)[1])
    assert (benjamini_hochberg(p) <= holm(p) + 1e-15).all()
    assert (holm(p) <= bonferroni(p) + 1e-15).all()
    assert (np.array(p) <= benjamini_hochberg(p) + 1e-15).all()


@pytest.mark.parametrize("correct", [holm, benjamini_hochberg, bonferroni])
def test_corrections_refuse(correct: Any) -> None:
    assert correct([]).shape == (0,)
    for p, message in (
        ([0.1, math.nan], "test 1 has nan"),
        ([1.1], "test 0"),
        ([-0.1], "test 0"),
        (0.5, "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            correct(p)
    with pytest.raises(ValueError, match="family of 1 tests"):
        bonferroni([0.1, 0.2], 1)


def cell(*, t: float = 1.0, ranks: float = 0.1, **other: Any) -> PairedTest:
    """A cell whose own p-values leave room for any corrected one."""
    x = np.random.default_rng(0).normal(size=40)
    base = paired_test(x, np.zeros(40), np.arange(40) // 4)
    small = {"p_t": 0.0, "p_wilcoxon": 0.0, "p_tost": 0.5, "t": t, "rank_biserial": ranks}
    return replace(base, **{**small, **other})


@pytest.mark.parametrize(
    ("test", "p_t", "p_wilcoxon", "want"),
    [
        (cell(), 0.01, 0.05, "valid"),
        (cell(t=-1, ranks=-0.1), 0.01, 0.01, "inverted"),
        (cell(ranks=-0.1), 0.01, 0.01, "disagreement"),
        (cell(t=-1), 0.01, 0.01, "disagreement"),
        (cell(), 0.01, 0.06, "disagreement"),
        (cell(), 0.06, 0.01, "disagreement"),
        (cell(), 0.06, 0.06, "inconclusive"),
        # Signs of what is not significant mean nothing.
        (cell(ranks=-0.1), 0.5, 0.5, "inconclusive"),
        # Equivalence wins over a difference that is significant but too small.
        (cell(p_tost=0.05), 0.01, 0.01, "equivalent"),
        (cell(p_tost=0.01), 0.5, 0.01, "equivalent"),
        (cell(p_tost=0.051), 0.5, 0.5, "inconclusive"),
        # Too few wins over everything.
        (cell(n_pairs=9), 0.01, 0.01, "inconclusive"),
        (cell(n_clusters=4), 0.01, 0.01, "inconclusive"),
        (cell(n_clusters=4, p_tost=0.0), 0.5, 0.5, "inconclusive"),
        (cell(n_pairs=10, n_clusters=5), 0.01, 0.01, "valid"),
    ],
)
def test_verdict(test: PairedTest, p_t: float, p_wilcoxon: float, want: str) -> None:
    assert verdict(test, p_t, p_wilcoxon) == want


@pytest.mark.parametrize(
    ("documents", "n_tests", "alpha", "want"),
    [
        # 2^-7 = 0.0078: six times that is 0.047, seven times 0.055.
        (8, 6, 0.05, "disagreement"),
        (8, 7, 0.05, "inconclusive"),
        (8, 20, 0.05, "inconclusive"),
        (12, 102, 0.05, "disagreement"),
        (12, 103, 0.05, "inconclusive"),
        (12, 144, 0.05, "inconclusive"),
        (13, 144, 0.05, "disagreement"),
        (5, 1, 0.05, "inconclusive"),
        (6, 1, 0.05, "disagreement"),
        # Exactly alpha is significant.
        (6, 2, 0.0625, "disagreement"),
        (6, 2, 0.0624, "inconclusive"),
        # From 30 documents on p is the normal distribution's.
        (29, 10**9, 0.05, "inconclusive"),
        (30, 10**9, 0.05, "disagreement"),
    ],
)
def test_ranks_that_cannot_be_significant_do_not_disagree(
    documents: int, n_tests: int, alpha: float, want: str
) -> None:
    few = cell(n_clusters=documents)
    assert verdict(few, 0.001, 1.0, n_tests=n_tests, alpha=alpha) == want
    # Nor do they agree: a t that is not significant is inconclusive, and equivalence wins.
    assert verdict(few, 1.0, 1.0, n_tests=n_tests, alpha=alpha) == "inconclusive"
    small = cell(n_clusters=documents, p_tost=0.01)
    assert verdict(small, 0.001, 1.0, n_tests=n_tests, alpha=alpha) == "equivalent"
    # Where other tests of the family have more documents, Holm may let ranks be significant all the same.
    assert verdict(few, 0.001, 0.001, n_tests=n_tests, alpha=alpha) == "valid"
    assert verdict(few, 1.0, 0.001, n_tests=n_tests, alpha=alpha) == "disagreement"


@pytest.mark.parametrize(("documents", "n_tests"), [(8, 6), (8, 7), (12, 102), (12, 103)])
def test_the_bound_is_that_of_the_test(documents: int, n_tests: int) -> None:
    """Differences that are all positive have the smallest p of ranks that there is; all tests of the family do."""
    x = np.random.default_rng(0).uniform(1, 2, size=10 * documents)
    test = paired_test(x, np.zeros_like(x), np.arange(len(x)) // 10)
    assert test.p_wilcoxon == 2.0 ** (1 - documents)
    p_t, p_wilcoxon = (holm([p] * n_tests)[0] for p in (test.p_t, test.p_wilcoxon))
    found = verdict(test, p_t, p_wilcoxon, n_tests=n_tests)
    assert found == ("valid" if p_wilcoxon <= 0.05 else "inconclusive")
    assert (p_wilcoxon <= 0.05) == (n_tests in (6, 102))


def test_verdict_by_other_standards() -> None:
    assert verdict(cell(), 0.01, 0.01, alpha=0.005) == "inconclusive"
    assert verdict(cell(p_tost=0.01), 0.5, 0.5, p_tost_adjusted=0.1) == "inconclusive"
    for p in (1.5, math.nan, -0.1):
        with pytest.raises(ValueError, match="p_wilcoxon"):
            verdict(cell(), 0.1, p)
    with pytest.raises(ValueError, match="one test or more, not n_tests=0"):
        verdict(cell(), 0.1, 0.1, n_tests=0)
    with pytest.raises(ValueError, match=r"p_t is from the test's own, 0\.2"):
        verdict(cell(p_t=0.2), 0.1, 0.1)
