"""Bayes factor, equivalence and power of the audit's tests, beside other implementations and their definitions."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import integrate, stats
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired

from moe_lens.audit.statistics import detectable_d, jzs_log_bayes_factor, paired_test, tost
from tests.test_statistics import pairs

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize(
    ("t", "n", "bayes_factor"),
    [
        # From pingouin 0.7 (bayesfactor_ttest, paired, r = sqrt(2) / 2), itself checked against R's BayesFactor.
        (3.5, 20, 17.18461571963917),
        (0.0, 10, 0.3087935567082449),
        (2.0, 40, 1.028465926870552),
        (-1.2, 200, 0.160279905074594),
        (5.0, 1000, 7903.389636737121),
        (0.3, 1_000_000, 0.0011803135230036921),
    ],
)
def test_bayes_factor_of_another_implementation(t: float, n: int, bayes_factor: float) -> None:
    assert math.exp(jzs_log_bayes_factor(t, n)) == pytest.approx(bayes_factor, rel=1e-9)


@pytest.mark.parametrize(("t", "n"), [(0.0, 5), (2.2, 15), (-3.1, 60.5), (1.0, 90), (6.0, 120)])
@pytest.mark.parametrize("scale", [math.sqrt(2) / 2, 1.0])
def test_bayes_factor_by_its_definition(t: float, n: float, scale: float) -> None:
    """The likelihood of t averaged over a Cauchy prior of the effect, over its likelihood without one."""
    nu = n - 1

    def integrand(delta: float) -> float:
        return float(stats.nct.pdf(t, nu, delta * math.sqrt(n)) * stats.cauchy.pdf(delta, scale=scale))

    peak, width = t / math.sqrt(n), 12 / math.sqrt(n)
    edges = (peak - width, peak, peak + width)
    marginal = sum(integrate.quad(integrand, a, b, epsabs=0)[0] for a, b in itertools.pairwise(edges))
    want = marginal / stats.t.pdf(t, nu)
    assert math.exp(jzs_log_bayes_factor(t, n, scale=scale)) == pytest.approx(want, rel=1e-5)


def test_bayes_factor_past_floating_point() -> None:
    n = 100_000
    x = np.random.default_rng(0).normal(0.5, size=n)
    found = paired_test(x, np.zeros(n))
    assert found.bayes_factor == math.inf
    # For many pairs: the likelihood ratio at the estimate, times the prior there and the width of the likelihood.
    nu = n - 1
    likelihood = n / 2 * math.log1p(found.t**2 / nu)
    width = math.sqrt(2 * math.pi * (1 + found.cohens_d**2 / 2) / n)
    prior = stats.cauchy.pdf(found.cohens_d, scale=math.sqrt(0.5))
    assert found.log_bayes_factor == pytest.approx(likelihood + math.log(prior * width), abs=0.2)
    assert replace(found, log_bayes_factor=math.log(3)).bayes_factor == pytest.approx(3)


@pytest.mark.parametrize(("t", "n"), [(math.nan, 5), (1.0, 0.5), (1.0, math.nan), (1.0, math.inf)])
def test_bayes_factor_refuses(t: float, n: float) -> None:
    with pytest.raises(ValueError, match="n of at least 1"):
        jzs_log_bayes_factor(t, n)


@pytest.mark.parametrize("bound", [0.05, 0.3, 1.0])
def test_tost_is_statsmodels(bound: float) -> None:
    high, low = pairs(80)
    x = high - low
    p = ttost_paired(high, low, -bound, bound)[0]
    assert tost(x.mean(), x.std(ddof=1) / math.sqrt(80), 79, bound) == pytest.approx(p, rel=1e-10)


def test_tost_of_d_is_the_interval_within_the_bounds() -> None:
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(30), 40)
    passed = []
    for shift in np.linspace(-0.1, 0.1, 21):
        x = rng.normal(shift, size=1200)
        # The interval of level 90% says what the tests at 5% do.
        found = paired_test(x, np.zeros(1200), cluster, alpha=0.1)
        low, high = found.d_ci
        passed.append(found.p_tost <= 0.05)
        assert passed[-1] == (max(-low, high) <= 0.1)
        wider = paired_test(x, np.zeros(1200), cluster, smallest_effect=0.2)
        assert wider.p_tost < found.p_tost
    assert 0 < sum(passed) < 21


def test_tost_of_d_is_nearly_that_of_the_mean_in_standard_deviations() -> None:
    """statsmodels' bound is in nats; where d is small, it hardly matters that the standard deviation is estimated."""
    x = np.random.default_rng(0).normal(0.02, size=2000)
    bound = 0.1 * x.std(ddof=1)
    p = ttost_paired(x, np.zeros(2000), -bound, bound)[0]
    assert paired_test(x, np.zeros(2000)).p_tost == pytest.approx(p, rel=0.05)


@pytest.mark.parametrize(
    ("n", "alpha"), [(4, 0.05), (30, 0.05), (30, 0.0025), (200, 0.05), (200, 0.0025), (100_000, 0.05)]
)
def test_detectable_d_is_statsmodels(n: int, alpha: float) -> None:
    d = detectable_d(n, n - 1, alpha=alpha)
    assert TTestPower().power(d, n, alpha) == pytest.approx(0.8, abs=1e-4)


def test_detectable_d_of_the_published_audit() -> None:
    """200 pairs: 0.20 at 5%, 0.28 after Bonferroni over 20 cells."""
    assert round(detectable_d(200, 199), 2) == 0.20
    assert round(detectable_d(200, 199, alpha=0.05 / 20), 2) == 0.28
    assert detectable_d(200, 0) == math.inf
    assert detectable_d(200, 4) > detectable_d(200, 199)
    with pytest.raises(ValueError, match="power"):
        detectable_d(200, 199, power=1.0)
