"""What leaving a sender out does to the choice of one router: ranks, the chosen experts and their weights.

Slow and obvious, one token at a time in float64. The sender's scores S are taken off the logits L, and the router
chooses again from L' = L - S: nothing else changes, neither the stream nor its scale. The choice is the family's
own, read from the transformers config. Nothing of moe_lens is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.reference_routing import Senders, Values, dense_scores, readout_logits


def ranks_of(logits: Sequence[float]) -> list[int]:
    """Each expert's rank among all, 1 for the highest logit; of equal ones the lower index comes first."""
    order = highest_first(logits)
    return [order.index(expert) + 1 for expert in range(len(logits))]


def highest_first(values: Sequence[float]) -> list[int]:
    """Indices from the highest value to the lowest; of equal values the lower index comes first."""
    return sorted(range(len(values)), key=lambda index: (-values[index], index))


def probabilities_of(logits: Sequence[float]) -> list[float]:
    """Softmax over all experts."""
    highest = max(logits)
    exponentials = [math.exp(logit - highest) for logit in logits]
    return [exponential / sum(exponentials) for exponential in exponentials]


def eligible_experts(probabilities: Sequence[float], config: Any) -> list[int]:
    """The experts that may be chosen: all, or under DeepSeek's rule those of the best groups. A group is as good
    as its best expert; of equally good groups the earlier one comes first."""
    n_experts = len(probabilities)
    if getattr(config, "topk_method", "greedy") != "group_limited_greedy":
        return list(range(n_experts))
    size = n_experts // config.n_group
    best_of_group = [max(probabilities[group * size : (group + 1) * size]) for group in range(config.n_group)]
    best_groups = highest_first(best_of_group)[: config.topk_group]
    return [expert for expert in range(n_experts) if expert // size in best_groups]


def chosen_experts(logits: Sequence[float], config: Any) -> list[int]:
    """The experts that the router chooses for these logits, heaviest first."""
    probabilities = probabilities_of(logits)
    eligible = eligible_experts(probabilities, config)
    in_order = [expert for expert in highest_first(probabilities) if expert in eligible]
    return in_order[: config.num_experts_per_tok]


def weights_of(logits: Sequence[float], config: Any) -> list[float]:
    """The weight with which each expert's output is added, `[expert]`; zero for those that are not chosen."""
    probabilities, chosen = probabilities_of(logits), chosen_experts(logits, config)
    factor = 1.0
    if config.model_type == "deepseek_v2":  # whatever its norm_topk_prob says: transformers does not read it
        factor = config.routed_scaling_factor
    elif config.model_type == "mixtral" or config.norm_topk_prob:
        factor = 1 / sum(probabilities[expert] for expert in chosen)
    return [
        factor * probability if expert in chosen else 0.0 for expert, probability in enumerate(probabilities)
    ]


def rank_shift_of(
    logits: Sequence[float], scores: Sequence[float], config: Any
) -> tuple[float, float, float]:
    """How the choice for one token changes when a sender's scores are taken off its logits, both `[expert]`.

    Returns:
        aarv: by how many ranks an expert that was chosen moves on average, up or down, among all experts
            ("average absolute ranking variation of top-K experts").
        overlap: the share of the chosen experts that are still chosen, 0 to 1.
        weight_change: the sum over all experts of |weight before - weight after|, as applied.
    """
    left = [logit - score for logit, score in zip(logits, scores, strict=True)]
    before, after = chosen_experts(logits, config), chosen_experts(left, config)
    rank_before, rank_after = ranks_of(logits), ranks_of(left)
    aarv = sum(abs(rank_before[expert] - rank_after[expert]) for expert in before) / len(before)
    overlap = len(set(before) & set(after)) / len(before)
    weight_change = sum(
        abs(one - other)
        for one, other in zip(weights_of(logits, config), weights_of(left, config), strict=True)
    )
    return aarv, overlap, weight_change


def rank_shifts(
    hf_model: Any, values: Values, receiver: int, by: str = "layer"
) -> dict[str, dict[str, np.ndarray]]:
    """For each sender `aarv`, `overlap` and `weight_change` at every token, each `[batch, pos]`."""
    logits = readout_logits(hf_model, values, receiver)
    shifts: dict[str, dict[str, np.ndarray]] = {}
    for name, scores in dense_scores(hf_model, values, receiver, by).items():
        shifts[name] = rank_shifts_of(logits, scores, hf_model.config)
    return shifts


def rank_shifts_of(logits: np.ndarray, scores: np.ndarray, config: Any) -> Senders:
    """`rank_shift_of` at every token: both `[batch, pos, expert]`, the three measures `[batch, pos]`."""
    shifts = {measure: np.zeros(logits.shape[:2]) for measure in ("aarv", "overlap", "weight_change")}
    for row, position in np.ndindex(*logits.shape[:2]):
        three = rank_shift_of(logits[row, position].tolist(), scores[row, position].tolist(), config)
        for measure, value in zip(shifts, three, strict=True):
            shifts[measure][row, position] = value
    return shifts


def average_ranks(values: Sequence[float]) -> list[float]:
    """Each value's rank, 1 for the lowest; equal values share the mean of the ranks they take up."""
    ranks = []
    for value in values:
        lower = sum(other < value for other in values)
        equal = sum(other == value for other in values)  # itself among them
        ranks.append(lower + (equal + 1) / 2)
    return ranks


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation: Pearson's, of the ranks. NaN where all values on one side are equal."""
    assert len(x) == len(y)
    x_ranks, y_ranks = average_ranks(x), average_ranks(y)
    x_mean, y_mean = sum(x_ranks) / len(x), sum(y_ranks) / len(y)
    x_squares = sum((rank - x_mean) ** 2 for rank in x_ranks)
    y_squares = sum((rank - y_mean) ** 2 for rank in y_ranks)
    products = sum((a - x_mean) * (b - y_mean) for a, b in zip(x_ranks, y_ranks, strict=True))
    if x_squares == 0 or y_squares == 0:
        return math.nan
    return products / math.sqrt(x_squares * y_squares)
