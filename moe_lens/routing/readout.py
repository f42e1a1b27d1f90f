"""What a router reads: its weights with the norm's gain folded in, so that a score is linear in the stream.

At a receiving layer r the router sees gamma_r * x / s_r, with x the residual stream `hook_resid_mid` and s_r
its scale `ln2.hook_scale`. With the readout R_r = W_r diag(gamma_r), its logits are R_r x / s_r: a sum over
whatever x is a sum of. No family here has a router bias, so nothing else is in the logits.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.model.hooked_moe import HookedMoE

Experts = Literal["all", "selected"] | Sequence[int]
"""Over which experts of a receiver measures are taken: all, those that it selects at the token, or a list."""


def check_receiver(model: HookedMoE, receiver: int) -> int:
    """A receiving layer, after it was found to have a router.

    Raises:
        ValueError: it is no MoE layer; those of the model are named.
    """
    try:
        layer = -1 if isinstance(receiver, bool) else operator.index(receiver)
    except TypeError:
        layer = -1
    if layer not in model.cfg.moe_layers:
        raise ValueError(
            f"receiver {receiver!r} is no MoE layer, so it has no router; {model.cfg.model_name} has MoE layers "
            f"{', '.join(map(str, model.cfg.moe_layers))}"
        )
    return layer


def router_readout(model: HookedMoE, receiver: int) -> Float[Tensor, "expert d_model"]:
    """R_r = W_r diag(gamma_r) in float32, without a gradient: logits are R_r x / s_r.

    Args:
        receiver: an MoE layer.

    Raises:
        ValueError: it is none.
    """
    block = model.blocks[check_receiver(model, receiver)]
    weight, gain = block.mlp.router.weight, block.ln2.w  # type: ignore[union-attr]
    return weight.detach().float() * gain.detach().float()  # type: ignore[operator]


def stacked_readouts(model: HookedMoE, receivers: Sequence[int]) -> Float[Tensor, "receiver expert d_model"]:
    """The readouts of several MoE layers, so that one matmul projects a sender onto all of them."""
    return torch.stack([router_readout(model, receiver) for receiver in receivers])


def check_receivers(model: HookedMoE, receivers: Sequence[int] | None) -> tuple[int, ...]:
    """The receiving layers, None being all MoE layers.

    Raises:
        ValueError: one that is no MoE layer, or not in rising order.
    """
    chosen = tuple(
        check_receiver(model, receiver)
        for receiver in (model.cfg.moe_layers if receivers is None else receivers)
    )
    if not chosen or list(chosen) != sorted(set(chosen)):
        raise ValueError(f"receivers must be layers in rising order, each once, not {chosen}")
    return chosen


def check_experts(model: HookedMoE, experts: Experts, *, rank_shift: bool) -> tuple[int, ...] | None:
    """The experts measured, None where it is all (or those that each token's router selects).

    Raises:
        ValueError: no such expert, one that comes twice, or ranks among some experts only.
    """
    if isinstance(experts, str):
        if experts in ("all", "selected"):
            return None
        raise ValueError(f"experts={experts!r} must be 'all', 'selected', or a list of experts, each once")
    try:
        chosen = tuple(-1 if isinstance(e, bool) else operator.index(e) for e in experts)
    except TypeError as error:
        raise ValueError(f"there is no expert such as in {experts!r}: {error}") from error
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"experts={list(chosen)} must be 'all', 'selected', or a list of experts, each once")
    wrong = [e for e in chosen if e not in range(model.cfg.n_experts)]
    if wrong:
        raise ValueError(
            f"there is no expert {wrong[0]!r}; {model.cfg.model_name} has {model.cfg.n_experts} a layer"
        )
    if rank_shift:
        raise ValueError("ranks are among all experts: rank_shift=True needs experts='all' or 'selected'")
    return chosen
