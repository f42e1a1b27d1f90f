"""Explain: where router scores come from, and how busy every expert is."""

from moe_lens.routing.attribution import RouterLogitAttrs, attribution_hooks, router_logit_attrs
from moe_lens.routing.contributions import RoutingContributions, routing_contributions

__all__ = [
    "RouterLogitAttrs",
    "RoutingContributions",
    "attribution_hooks",
    "router_logit_attrs",
    "routing_contributions",
]
