"""Population metrics of an expert's importance: the four that the audit tests, others from the pruning literature, and
a random baseline.

In the formulas, i is an expert, t one of T real tokens, A_i the tokens that select i, p_i(t) the router's probability
before top-k, g_i(t) the routing weight as applied, E_i(x_t) the expert's output before it. All are population metrics:
one number for an expert, whatever the token. Means over A_i are NaN for an expert that is never active. Means over
tokens have standard errors, clustered by document; the others have none.

A higher value claims more importance, but for `output_similarity` and `gate_entropy`, whose claim is the other way.
Where a source tries both ends (MC-Suite drops the lowest or the highest of a norm), or names none, higher stands for
more.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from moe_lens.audit.metric_registry import metric
from moe_lens.audit.metric_statistics import Estimate, ExpertStatistics

AUDIT = "arXiv:2606.10703, section 2"
PAPER_METRICS = ("utilization_rate", "activation_norm", "mean_routing_weight", "activation_std")
"""The four of the causal audit of expert importance (arXiv:2606.10703)."""

Values = Float[np.ndarray, "layer expert"]


# ---- the audit's four ----


@metric("utilization_rate", source=AUDIT)
def utilization_rate(statistics: ExpertStatistics) -> Estimate:
    """|A_i| / T: the share of tokens that select the expert. A layer's shares sum to k."""
    return statistics.over_tokens("selected")


@metric("activation_norm", source=f"{AUDIT}, which names it without a formula")
def activation_norm(statistics: ExpertStatistics) -> Estimate:
    """mean over A_i of ||E_i(x_t)||_2, before the routing weight."""
    return statistics.when_active("output_norm")


@metric("mean_routing_weight", source=AUDIT)
def mean_routing_weight(statistics: ExpertStatistics) -> Estimate:
    """mean over A_i of g_i(t), as applied: after normalisation and scaling."""
    return statistics.when_active("routing_weight")


@metric("activation_std", source=f"{AUDIT}, which names it without a formula", may_be_nan=True)
def activation_std(statistics: ExpertStatistics) -> Values:
    """standard deviation (ddof 1) over A_i of ||E_i(x_t)||_2; NaN for an expert that is active only once."""
    return np.sqrt(statistics.output_norm_variance)


# ---- activations ----


@metric("router_weighted_activation_norm", source="REAP, arXiv:2510.13999, equation 9")
def router_weighted_activation_norm(statistics: ExpertStatistics) -> Estimate:
    """mean over A_i of g_i(t) ||E_i(x_t)||_2: the mean gap norm where the expert is active."""
    return statistics.when_active("weighted_norm")


@metric(
    "mean_gap_norm",
    source="the gap norm of arXiv:2606.10703, section 2, averaged as a one-shot removal would have it",
)
def mean_gap_norm(statistics: ExpertStatistics) -> Estimate:
    """1/T sum over A_i of ||g_i(t) E_i(x_t)||_2: how far the layer's output moves at a token, 0 where the expert is not
    active, were the expert removed. Among the tokens where it is active the mean is `router_weighted_activation_norm`,
    so this is that times `utilization_rate`."""
    return statistics.over_tokens("gap_norm")


@metric("total_activation_norm", source="EAN, MC-Suite, arXiv:2504.05586; a sum there")
def total_activation_norm(statistics: ExpertStatistics) -> Estimate:
    """1/T sum over A_i of ||E_i(x_t)||_2: an expert counts by how often it is active, too."""
    return statistics.over_tokens("output_norm")


@metric("mean_squared_activation_norm", source="MSAN, arXiv:2606.15716")
def mean_squared_activation_norm(statistics: ExpertStatistics) -> Estimate:
    """mean over A_i of ||E_i(x_t)||_2^2."""
    return statistics.when_active("squared_output_norm")


@metric("max_activation", source="the outliers of super experts, arXiv:2507.23279")
def max_activation(statistics: ExpertStatistics) -> Values:
    """max over A_i and coordinates d of |E_i(x_t)_d|."""
    return statistics.largest_output


@metric(
    "output_similarity",
    source="HC-SMoE's similarity of mean outputs, arXiv:2410.08589",
    may_be_nan=True,
    higher_is_more_important=False,
)
def output_similarity(statistics: ExpertStatistics) -> Values:
    """mean over the other active experts j of the layer of cos(m_i, m_j), with m_i the mean over A_i of E_i(x_t). High
    means replaceable, so a high value argues for less importance. NaN without another active expert, and for a mean
    output of zero.

    Each expert's mean is over its own tokens, which is what sums over a stream can hold: no expert is run where it was
    not chosen.
    """
    norms = np.linalg.norm(statistics.mean_output, axis=2, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        directions = statistics.mean_output / norms
    known = np.isfinite(directions).all(axis=2)
    directions = np.where(known[..., None], directions, 0.0)
    # The sum over all includes the expert itself, whose cosine is 1.
    cosines = (directions * directions.sum(axis=1, keepdims=True)).sum(axis=2) - 1.0
    n_others = known.sum(axis=1, keepdims=True) - 1
    return np.where(known & (n_others > 0), cosines / np.maximum(n_others, 1), np.nan)


# ---- the router ----


@metric("soft_routing_count", source="the soft counting of SEER-MoE, arXiv:2404.05089; a sum there")
def soft_routing_count(statistics: ExpertStatistics) -> Estimate:
    """1/T sum over all tokens of p_i(t), selected or not. A layer's sum to 1."""
    return statistics.over_tokens("probability")


@metric(
    "weighted_utilization", source="frequency weighted by the gate, arXiv:2510.13999 and arXiv:2404.05089"
)
def weighted_utilization(statistics: ExpertStatistics) -> Estimate:
    """1/T sum over A_i of g_i(t): selections counted by their routing weight."""
    return statistics.over_tokens("routing_weight")


@metric(
    "gate_entropy",
    source="the gate's entropy, as in SEER-MoE, arXiv:2404.05089, over each expert's tokens",
    higher_is_more_important=False,
)
def gate_entropy(statistics: ExpertStatistics) -> Estimate:
    """mean over A_i of -sum_j p_j(t) ln p_j(t), in nats: how undecided the router is where it selects the expert. High
    means less sure, so a high value argues for less importance."""
    return statistics.when_active("gate_entropy")


@metric(
    "routing_entropy",
    source="after the released code of arXiv:2606.10703, there of logits or of applied weights",
    may_be_nan=True,
)
def routing_entropy(statistics: ExpertStatistics) -> Values:
    """-sum_t q_i(t) ln q_i(t) - ln T with q_i(t) = p_i(t) / sum_t p_i(t), in nats: how evenly the expert's probability
    is spread over the tokens; 0 where it is the same at all, and lower the more it is concentrated. NaN for an expert
    whose probability is 0 everywhere."""
    mean = statistics.over_tokens("probability").value
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = np.log(mean) + statistics.over_tokens("probability_entropy").value / mean
    return np.where(mean > 0, entropy, np.nan)


@metric("router_row_norm", source="router weight norm, MC-Suite, arXiv:2504.05586")
def router_row_norm(statistics: ExpertStatistics) -> Values:
    """||W_r[i]||_2 of the router's row, as stored: without the gain of the norm before it."""
    return statistics.weight_norms["router"]


# ---- weights ----


@metric(
    "expert_weight_norm",
    source="magnitude pruning, as among the weight criteria of MC-Suite, arXiv:2504.05586",
)
def expert_weight_norm(statistics: ExpertStatistics) -> Values:
    """(||W_gate||_F^2 + ||W_up||_F^2 + ||W_down||_F^2)^(1/2) of the expert's matrices."""
    return np.sqrt(sum(statistics.weight_norms[name] ** 2 for name in ("W_gate", "W_up", "W_down")))


@metric("down_projection_norm", source="magnitude pruning of what the expert writes with")
def down_projection_norm(statistics: ExpertStatistics) -> Values:
    """||W_down||_F."""
    return statistics.weight_norms["W_down"]


# ---- the baseline ----


@metric("random", source="the baseline that a valid metric beats")
def random(statistics: ExpertStatistics) -> Values:
    """a uniform number in [0, 1), drawn by seed and layer: the same whichever other layers are asked for."""
    return np.stack(
        [
            np.random.default_rng([statistics.seed, layer]).random(statistics.n_experts)
            for layer in statistics.layers
        ]
    )
