"""One routing decision at one token: exact logits, choice, and the expert that a given one is held against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moe_lens.config import RouterConfig
from moe_lens.model.moe import eligible_probabilities
from moe_lens.routing.one_token import OneToken
from moe_lens.routing.rank_shift import choice_of
from moe_lens.routing.readout import router_readout
from moe_lens.routing.rounding import stream_rounds


@dataclass(frozen=True, eq=False)
class Decision:
    """What a router made of one token, and two of its experts.

    Attributes:
        token: everything that was written there.
        readout: the router's, gain folded in.
        logits: of the stored stream, exact (float32).
        scale: the token's, at the router.
        chosen, weights: by the family's rule, for the exact logits; weights as applied, 0 where not chosen.
        expert, boundary: the two that are compared.
        boundary_given: whether the caller named the boundary.
    """

    token: OneToken
    readout: Float[Tensor, "expert d_model"]
    logits: Float[Tensor, " expert"]
    scale: Float[Tensor, ""]
    chosen: Bool[Tensor, " expert"]
    weights: Float[Tensor, " expert"]
    expert: int
    boundary: int
    boundary_given: bool

    @classmethod
    def of(cls, token: OneToken, expert: int, against: int | None) -> Decision:
        """The decision about an expert.

        Raises:
            ValueError: the logits are not finite; nothing is left out to compare with, or the expert is compared with
                itself.
        """
        readout = router_readout(token.model, token.receiver)
        scale = token.at_receiver("ln2.hook_scale").float()[0]
        logits = readout @ token.at_receiver("hook_resid_mid").float() / scale
        if not bool(logits.isfinite().all()):
            raise ValueError(f"the router's logits at layer {token.receiver} hold values that are not finite")
        router = token.model.cfg.router
        chosen, weights, _ = choice_of(logits, router)
        boundary = boundary_of(logits, expert, router) if against is None else against
        if boundary == expert:
            raise ValueError(f"expert {expert} cannot be compared with itself; against= another expert")
        return cls(token, readout, logits, scale, chosen, weights, expert, boundary, against is not None)

    @property
    def router(self) -> RouterConfig:
        return self.token.model.cfg.router

    @property
    def rows(self) -> Float[Tensor, "three d_model"]:
        """Readouts of the expert, the boundary, and their difference: that of two scores would lose digits."""
        expert, boundary = self.readout[self.expert], self.readout[self.boundary]
        return torch.stack((expert, boundary, expert - boundary))

    @property
    def rounds(self) -> bool:
        """Whether the stream's rounding is a sender."""
        return stream_rounds(self.token.model.cfg.dtype)

    @property
    def model_logit_difference(self) -> float:
        """max |exact logits - hook_router_logits|."""
        return float((self.logits - self.token.at_receiver("mlp.hook_router_logits").float()).abs().max())

    @property
    def chosen_by_model(self) -> bool:
        """Whether the expert was chosen in the run."""
        return self.expert in self.token.at_receiver("mlp.hook_expert_indices").tolist()


def boundary_of(logits: Float[Tensor, " expert"], expert: int, router: RouterConfig) -> int:
    """The worst chosen expert for one that was left out; the best left out for a chosen one, among those that the
    router could have chosen (under group-limited routing, those of eligible groups), where there are any.

    Raises:
        ValueError: the router chooses all experts.
    """
    chosen = choice_of(logits, router).chosen
    order = logits.argsort(descending=True, stable=True)
    if not bool(chosen[expert]):
        return int(order[chosen[order]][-1])
    left_out = ~chosen
    if not bool(left_out.any()):
        raise ValueError(
            f"the router chooses all of its {len(logits)} experts, so none is left out to compare with; give against="
        )
    could = left_out & eligible_experts(logits, router)
    return int(order[(could if bool(could.any()) else left_out)[order]][0])


def eligible_experts(logits: Float[Tensor, " expert"], router: RouterConfig) -> Bool[Tensor, " expert"]:
    """Which experts a router may choose: all, or those of the best groups."""
    return (eligible_probabilities(logits.softmax(dim=-1)[None, None], router) > -torch.inf)[0, 0]
