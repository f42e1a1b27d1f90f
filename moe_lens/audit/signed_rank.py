"""Wilcoxon's signed-rank test where the differences of a document may go together in any way.

The differences are ranked by size, zeros with them; the zeros are then dropped (Pratt 1959, Remarks on zeros and ties
in the Wilcoxon signed rank procedures, JASA 54, 655-667), ties share their mean rank. With r_g the sum of a document's
signed ranks,

    z = sum_g r_g / sqrt(sum_g r_g^2)

If each document's differences are jointly symmetric about zero, turning the signs of whole documents changes nothing:
each r_g has mean 0, and sum r_g^2 is the variance of their sum over these turns, whatever the dependence within
documents (Rosner, Glynn, Lee 2006, The Wilcoxon signed rank test for paired comparisons of clustered data, Biometrics
62, 185-192, with every pair of weight one; Datta and Satten 2008, A signed-rank test for clustered data, Biometrics 64,
501-507, treat documents whose length tells of their differences). z is compared with the standard normal; under 30
documents the exact distribution over all 2^G turns is used. Where every document holds one pair this is the ordinary
test.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

EXACT_BELOW = 30
"""Documents with a signed-rank sum other than zero, from which on the normal distribution serves."""


class SignedRank(NamedTuple):
    """Attributes:
    z: the statistic; 0 where every document's sum is.
    p: two-sided. With G documents it cannot be below 2^(1 - G): 0.0625 for 5 of them.
    rank_biserial: sum of the signed ranks over the sum of the ranks that count, -1 to 1 (Kerby 2014, The simple
        difference formula, Comprehensive Psychology 3); 0 where there are only zeros.
    """

    z: float
    p: float
    rank_biserial: float


def clustered_signed_rank(
    differences: Float[np.ndarray, " pair"], starts: Int[np.ndarray, " document"]
) -> SignedRank:
    """Args:
    differences: finite, a document after the other.
    starts: where each document starts.
    """
    # Twice the ranks are whole numbers, so that sums that ought to be equal are.
    ranks = np.rint(2 * stats.rankdata(np.abs(differences))).astype(np.int64)
    signed = np.sign(differences).astype(np.int64) * ranks
    sums = np.add.reduceat(signed, starts)
    # A document whose ranks cancel has the same sum whichever way it is turned.
    sums = sums[sums != 0]
    total, possible = int(sums.sum()), int(np.abs(signed).sum())
    if len(sums) == 0:
        return SignedRank(0.0, 1.0, 0.0)
    z = total / math.sqrt(np.square(sums.astype(np.float64)).sum())
    p = sign_flip_p(sums) if len(sums) < EXACT_BELOW else float(2 * stats.norm.sf(abs(z)))
    return SignedRank(z, p, total / possible)


def sign_flip_p(sums: Int[np.ndarray, " document"]) -> float:
    """The share of the 2^G choices of signs for which |sum| is at least what it is; exact.

    Every sum is one of a first half of the documents plus one of the second, so 2^(G / 2) sums of each, one of the
    lists sorted, count them all.
    """
    total = abs(int(sums.sum()))
    if total == 0:
        return 1.0
    first, second = (_signed_sums(half) for half in np.array_split(sums, 2))
    second.sort()
    as_large = len(second) * len(first) - int(np.searchsorted(second, total - first, side="left").sum())
    return 2 * as_large / (len(first) * len(second))


def _signed_sums(values: Int[np.ndarray, " n"]) -> Int[np.ndarray, " choice"]:
    sums = np.zeros(1, dtype=np.int64)
    for value in values:
        sums = np.concatenate([sums - value, sums + value])
    return sums
