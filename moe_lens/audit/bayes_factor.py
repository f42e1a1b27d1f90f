"""The JZS Bayes factor of a t statistic: how much better a difference of unknown size explains it than none does.

Source: Rouder, Speckman, Sun, Morey, Iverson (2009), Bayesian t tests for accepting and rejecting the null hypothesis,
Psychonomic Bulletin & Review 16, 225-237, equation 1. Under the alternative the effect delta (Cohen's d of the
population) has a Cauchy prior of scale r, which is a normal of variance g r^2 with g an inverse chi-square of one
degree of freedom; the variance has Jeffreys's prior under both. With nu = n - 1,

    BF10 = integral over g of (1 + n g r^2)^(-1/2) (1 + t^2 / ((1 + n g r^2) nu))^(-(nu + 1) / 2) p(g)
           / (1 + t^2 / nu)^(-(nu + 1) / 2),        p(g) = (2 pi)^(-1/2) g^(-3/2) e^(-1 / (2 g))
"""

from __future__ import annotations

import math

import numpy as np

PRIOR_SCALE = math.sqrt(2) / 2
"""r: half of the prior's effects lie within +-0.71 standard deviations, the customary "medium" width."""
_STEP = 0.01
"""Of the trapezoidal rule, in log z."""


def jzs_log_bayes_factor(t: float, n: float, *, scale: float = PRIOR_SCALE) -> float:
    """The natural logarithm of BF10, which itself is past floating point from a t of about 38 on.

    With z = g^(-1/2), which the prior makes half-normal, and the share w = z^2 / (z^2 + n r^2), the quotient above is

        BF10 = integral over z > 0 of 2 phi(z) w^(1/2) (1 + (1 - w) t^2 / (nu + w t^2))^((nu + 1) / 2)

    and in u = log z the integrand is smooth and vanishes on both sides, so that the trapezoidal rule is exact to
    rounding.

    Args:
        t: of one sample or of pairs; infinite where nothing varies.
        n: pairs, or as many independent pairs as those at hand are worth; need not be whole.
        scale: r of the Cauchy prior, in standard deviations of the differences.

    Returns:
        log BF10. 0 for n = 1, from which nothing can be learnt; infinite for an infinite t.

    Raises:
        ValueError: t is NaN, n is below 1 or not finite, or the scale is not positive.
    """
    if math.isnan(t) or not 1 <= n < math.inf or not 0 < scale < math.inf:
        raise ValueError(
            f"a Bayes factor needs a t, n of at least 1 and a positive scale, not {t}, {n}, {scale}"
        )
    if n == 1:
        return 0.0
    if math.isinf(t):
        return math.inf
    nu, a = n - 1, n * scale**2
    # The integrand is largest near z = scale / |d|, where d is large.
    u = np.arange(-(25 + math.log1p(abs(t) / math.sqrt(n) / scale)), math.log(40), _STEP)
    log_share = -np.logaddexp(0, math.log(a) - 2 * u)
    log_rest = -np.logaddexp(0, 2 * u - math.log(a))
    gain = np.log1p(np.exp(log_rest) * t**2 / (nu + np.exp(log_share) * t**2))
    log_prior = math.log(2) - 0.5 * math.log(2 * math.pi) - 0.5 * np.exp(2 * u) + u
    log_integrand = log_prior + 0.5 * log_share + 0.5 * (nu + 1) * gain
    return float(np.logaddexp.reduce(log_integrand)) + math.log(_STEP)
