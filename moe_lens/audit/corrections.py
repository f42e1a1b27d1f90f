"""Many tests: p-values corrected within a family, and what a cell of the audit is called.

A family is what one claim rests on: the cells (metric, layer) of the metrics are one, those of the control another.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from moe_lens.audit.paired_tests import PairedTest
from moe_lens.audit.signed_rank import EXACT_BELOW

Verdict = Literal["equivalent", "valid", "inverted", "disagreement", "inconclusive"]
ENOUGH_PAIRS = 10
ENOUGH_DOCUMENTS = 5


def holm(p: ArrayLike) -> Float[np.ndarray, " test"]:
    """P-values such that rejecting those of at most alpha makes any false rejection in the family at most that likely,
    however the tests depend on each other: with the p-values in ascending order, the running maximum of
    (tests - place) p, at most 1, the first place being 0.

    Source: Holm (1979), A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6,
    65-70.

    Raises:
        ValueError: p is not one-dimensional, or not of numbers from 0 to 1.
    """
    return _adjusted(p, "holm")


def benjamini_hochberg(p: ArrayLike) -> Float[np.ndarray, " test"]:
    """P-values such that rejecting those of at most q makes the expected share of false ones among the rejections at
    most q, for independent or positively dependent tests: from the largest on, the running minimum of
    tests / place p, the smallest having place 1.

    Source: Benjamini and Hochberg (1995), Controlling the false discovery rate, Journal of the Royal Statistical
    Society B 57, 289-300.

    Raises:
        ValueError: p is not one-dimensional, or not of numbers from 0 to 1.
    """
    return _adjusted(p, "fdr_bh")


def bonferroni(p: ArrayLike, n: int | None = None) -> Float[np.ndarray, " test"]:
    """n p, at most 1: comparing it with 0.05 is comparing p with 0.05 / n, as the published audit does with n = 20
    (four metrics at five layers) and, for its control, 5.

    Args:
        p: of the tests of a family.
        n: how many tests the family has, where they are not all here.

    Raises:
        ValueError: p is not one-dimensional, or not of numbers from 0 to 1; n is below their number.
    """
    values = _checked(p)
    if n is not None and n < len(values):
        raise ValueError(f"a family of {n} tests has no {len(values)} p-values")
    return np.minimum(values * (len(values) if n is None else n), 1.0)


def _checked(p: ArrayLike) -> Float[np.ndarray, " test"]:
    values = np.asarray(p, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"one p-value per test, not the shape {values.shape}")
    # Written so that NaN is out of range.
    wrong = np.flatnonzero(~((values >= 0) & (values <= 1)))
    if len(wrong):
        raise ValueError(f"a p-value is from 0 to 1, and test {wrong[0]} has {values[wrong[0]]}")
    return values


def _adjusted(p: ArrayLike, method: str) -> Float[np.ndarray, " test"]:
    values = _checked(p)
    if len(values) == 0:
        return values
    # Importing it takes a second, which those who load a model only need not wait for.
    from statsmodels.stats.multitest import multipletests

    return np.asarray(multipletests(values, method=method)[1])


def verdict(
    test: PairedTest,
    p_t_adjusted: float,
    p_wilcoxon_adjusted: float,
    *,
    p_tost_adjusted: float | None = None,
    n_tests: int = 1,
    alpha: float = 0.05,
) -> Verdict:
    """What a cell shows. The first that holds:

    0. under 10 pairs or 5 documents: `inconclusive`. This stands first, as what comes later would otherwise win
       whenever it mattered; where no documents were given, each pair counts as one.
    1. equivalence is shown: `equivalent`, |d| being below the bound, even beside a difference that is significant.
    2. t and signed ranks significant, both positive: `valid`
    3. both significant, both negative: `inverted`
    4. t alone is significant, and there are too few documents for ranks ever to be: `inconclusive`. The p of signed
       ranks over G documents, which exact sign flips give below 30 of them, is at least 2^(1 - G); where n_tests times
       that is above alpha, not even the smallest p of the family survives Holm's correction, so that ranks are silent
       whatever the differences are, which is no disagreement. That takes 8 documents and 7 tests, or 12 and 103.
    5. exactly one is significant, or both are and their signs differ: `disagreement`. Signed ranks test for symmetry
       about zero: they also reject where the mean is zero and the differences are skewed.
    6. else: `inconclusive`

    Args:
        test: of the cell; its signs, its counts and, unless given, its p_tost are read.
        p_t_adjusted: its p_t, corrected within the family.
        p_wilcoxon_adjusted: its p_wilcoxon, likewise.
        p_tost_adjusted: its p_tost, corrected where that is wanted. Uncorrected, each single claim of equivalence is
            wrong at most alpha of the time.
        n_tests: of the family within which p_t and p_wilcoxon were corrected; 1 where they were not.
        alpha: significant is a p of at most this.

    Raises:
        ValueError: a p is not from 0 to 1, or a corrected one is smaller than the test's own; n_tests is below 1.
    """
    if n_tests < 1:
        raise ValueError(f"a family has one test or more, not n_tests={n_tests}")
    p_tost = test.p_tost if p_tost_adjusted is None else p_tost_adjusted
    found = {"p_t": p_t_adjusted, "p_wilcoxon": p_wilcoxon_adjusted, "p_tost": p_tost}
    for name, p in found.items():
        own = getattr(test, name)
        # Corrections multiply and may round.
        if not own * (1 - 1e-12) <= p <= 1:
            raise ValueError(f"a corrected {name} is from the test's own, {own}, to 1, and not {p}")
    if test.n_pairs < ENOUGH_PAIRS or test.n_clusters < ENOUGH_DOCUMENTS:
        return "inconclusive"
    if p_tost <= alpha:
        return "equivalent"
    by_t, by_ranks = p_t_adjusted <= alpha, p_wilcoxon_adjusted <= alpha
    if by_t and by_ranks:
        if test.t > 0 and test.rank_biserial > 0:
            return "valid"
        return "inverted" if test.t < 0 and test.rank_biserial < 0 else "disagreement"
    if by_t and _too_few_for_ranks(test.n_clusters, n_tests, alpha):
        return "inconclusive"
    return "disagreement" if by_t or by_ranks else "inconclusive"


def _too_few_for_ranks(n_documents: int, n_tests: int, alpha: float) -> bool:
    """Whether the smallest p that sign flips of so many documents can have is above alpha after Holm's correction."""
    return n_documents < EXACT_BELOW and n_tests * 2.0 ** (1 - n_documents) > alpha
