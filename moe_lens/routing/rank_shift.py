"""What becomes of a router's choice when one sender's score is taken away at the token's true scale.

    AARV = 1/K  sum over the experts of the original top-K  |rank before - rank after|

with ranks among all N experts, 1 the best, ties broken by the lower index. It is the physical counterpart of a
score's variance: how far the chosen experts really move. Beside it stand the overlap of the two top-K and the
change in routing weights. Only the router's arithmetic is repeated: the sender's vector stays in the stream for
everybody else.

Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), eq. 13 (the
average absolute ranking variation), section 7.2 and appendix N.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.config import RouterConfig
from moe_lens.model.moe import applied_weights, eligible_probabilities


class RankShift(NamedTuple):
    """Attributes:
    aarv: mean absolute rank change of the originally chosen experts, in ranks.
    overlap: the share of the top-K that stays chosen, 0 to 1.
    weight_change: the sum over experts of |routing weight before - after|, an expert that is not chosen counting 0.
    """

    aarv: Float[Tensor, "*place"]
    overlap: Float[Tensor, "*place"]
    weight_change: Float[Tensor, "*place"]


def ranks(logits: Float[Tensor, "*place expert"]) -> Int[Tensor, "*place expert"]:
    """Every expert's rank by its logit: 1 the best, ties broken by the lower index."""
    order = logits.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(1, logits.shape[-1] + 1, device=logits.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


class Choice(NamedTuple):
    """What a router makes of logits.

    Attributes:
        chosen: which experts it chooses.
        weights: as it applies them, 0 for the others.
        ranks: of all experts by logit, as `ranks` gives them.
    """

    chosen: Bool[Tensor, "*place expert"]
    weights: Float[Tensor, "*place expert"]
    ranks: Int[Tensor, "*place expert"]


def choice_of(logits: Float[Tensor, "*place expert"], router: RouterConfig) -> Choice:
    """The experts that a router chooses for these logits, by its family's own rule. Ties go to the lower index.

    Args:
        logits: of all experts; their differences alone matter.
        router: the rule: top-k, groups, normalisation and scaling.
    """
    flat = logits.reshape(1, -1, logits.shape[-1])
    probabilities = flat.float().softmax(dim=-1)
    places = ranks(flat)
    ranked = places
    if router.n_groups > 1:
        eligible = eligible_probabilities(probabilities, router) > -torch.inf
        ranked = ranks(flat.masked_fill(~eligible, -torch.inf))
    # Chosen by rank of logits, not by probability: a small probability may have rounded to its neighbour's.
    chosen = ranked <= router.top_k
    indices = ranked.topk(router.top_k, dim=-1, largest=False).indices
    weights = torch.zeros_like(probabilities).scatter_(
        -1, indices, applied_weights(probabilities, indices, router)
    )
    return Choice(chosen.view(logits.shape), weights.view(logits.shape), places.view(logits.shape))


def rank_shift(
    logits: Float[Tensor, "*place expert"],
    scores: Float[Tensor, "*place expert"],
    router: RouterConfig,
    *,
    before: Choice | None = None,
) -> RankShift:
    """How ranks, choice and weights change when a sender's scores are taken away from the logits.

    Args:
        logits: the router's exact logits (`RouterLogitAttrs.logits`), in logits.
        scores: what the sender adds to them, in logits; its shape broadcasts with theirs.
        router: the model's `cfg.router`.
        before: `choice_of(logits, router)`, where it is at hand.

    Returns:
        AARV in ranks, overlap as a share, and the change in routing weights, each without the expert axis.

    Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs", eq. 13.
    """
    before = choice_of(logits, router) if before is None else before
    after = choice_of(logits - scores, router)
    moved = (before.ranks - after.ranks).abs() * before.chosen
    return RankShift(
        aarv=moved.sum(dim=-1).float() / router.top_k,
        overlap=(before.chosen & after.chosen).sum(dim=-1).float() / router.top_k,
        weight_change=(before.weights - after.weights).abs().sum(dim=-1),
    )
