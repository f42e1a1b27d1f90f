"""Explain: where router scores and logits come from, over what corpus you like, and how busy every expert is."""

from moe_lens.routing.attribution import RouterLogitAttrs, attribution_hooks, router_logit_attrs
from moe_lens.routing.contributions import RoutingContributions, routing_contributions
from moe_lens.routing.explain import Explanation, explain
from moe_lens.routing.logit_attribution import LogitAttrs, logit_attribution_hooks, logit_attrs
from moe_lens.routing.queries import (
    expert_variance_rank,
    own_block_heads,
    persistence,
    promote_inhibit,
    top_senders,
    variance_rank_correlation,
)
from moe_lens.routing.score_maps import mean_score_variance_maps, score_variance_maps
from moe_lens.routing.super_experts import super_expert_table, super_experts

__all__ = [
    "Explanation",
    "LogitAttrs",
    "RouterLogitAttrs",
    "RoutingContributions",
    "attribution_hooks",
    "expert_variance_rank",
    "explain",
    "logit_attribution_hooks",
    "logit_attrs",
    "mean_score_variance_maps",
    "own_block_heads",
    "persistence",
    "promote_inhibit",
    "router_logit_attrs",
    "routing_contributions",
    "score_variance_maps",
    "super_expert_table",
    "super_experts",
    "top_senders",
    "variance_rank_correlation",
]
