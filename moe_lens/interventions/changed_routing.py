"""The router's arithmetic under a change: experts excluded or forced, another top-k, weights scaled to their sum.

Everything here is about probabilities, choices and weights; hooks and replay both read it, so that an intervention
means the same in either.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.config import RouterConfig
from moe_lens.model.moe import eligible_probabilities


def choose(
    probabilities: Float[Tensor, "batch pos expert"],
    cfg: RouterConfig,
    *,
    k: int,
    excluded: Bool[Tensor, "batch pos expert"] | None = None,
    forced: Bool[Tensor, "batch pos expert"] | None = None,
) -> Int[Tensor, "batch pos k"]:
    """The k experts that a token takes, heaviest first.

    Args:
        probabilities: over all experts; they stay as they are, and only the selection changes.
        cfg: the family's rule: groups are the best ones among what is not excluded.
        k: how many are taken.
        excluded: never taken.
        forced: taken first, whatever their group; the highest-ranked others fill the rest. At most k at a place, and
            none that is excluded.

    Raises:
        ValueError: fewer than k experts remain to be chosen from, at the place that is named.
    """
    candidates = probabilities if excluded is None else probabilities.masked_fill(excluded, -torch.inf)
    ranked = eligible_probabilities(candidates, cfg)
    if forced is not None:
        # Above every probability; the order among the forced is restored below.
        ranked = ranked.masked_fill(forced, 2.0)
    scores, indices = ranked.topk(k, dim=-1)
    if excluded is not None or cfg.n_groups > 1:
        empty = (scores == -torch.inf).any(dim=-1).nonzero()
        if len(empty):
            batch, pos = empty[0].tolist()
            left = int((ranked[batch, pos] > -torch.inf).sum())
            raise ValueError(
                f"row {batch}, position {pos}: {left} experts remain to be chosen from, and {k} are wanted"
            )
    if forced is None:
        return indices
    order = probabilities.gather(-1, indices).argsort(dim=-1, descending=True, stable=True)
    return indices.gather(-1, order)


def ranking(
    probabilities: Float[Tensor, "batch pos expert"],
    indices: Int[Tensor, "batch pos k"],
    cfg: RouterConfig,
) -> Int[Tensor, "batch pos expert"]:
    """All experts from the first rank to the last: those chosen, by probability; then the others that the router may
    choose; then (under group-limited top-k) those of the other groups.

    Args:
        indices: the choice. Of experts with the same probability it says which come first.
    """
    order = probabilities.argsort(dim=-1, descending=True, stable=True)
    eligible = eligible_probabilities(probabilities, cfg) > -torch.inf
    standing = eligible.long().scatter(-1, indices, 2).gather(-1, order)
    return order.gather(-1, standing.argsort(dim=-1, descending=True, stable=True))


def weights_of(
    probabilities: Float[Tensor, "batch pos expert"],
    indices: Int[Tensor, "batch pos k"],
    kept: Bool[Tensor, "batch pos k"],
    cfg: RouterConfig,
) -> Float[Tensor, "batch pos k"]:
    """The family's weights when only the kept slots were chosen: the others get 0, and count for no sum.

    In float32, normalised and scaled as the family does.
    """
    weights = probabilities.gather(-1, indices) * kept
    if cfg.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * cfg.scaling_factor if cfg.scaling_factor != 1.0 else weights


def renormalized(
    weights: Float[Tensor, "*place k"], kept: Bool[Tensor, "*place k"]
) -> Float[Tensor, "*place k"]:
    """Weights of the kept slots, scaled so that their sum is what all slots' was; 0 for the others.

    Computed in float32 and returned in the weights' dtype. Where nothing is kept they are NaN.
    """
    full = weights.float()
    left = full * kept
    return (left * (full.sum(dim=-1, keepdim=True) / left.sum(dim=-1, keepdim=True))).to(weights.dtype)
