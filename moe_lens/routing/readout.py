"""What a router reads: its weights with the norm's gain folded in, so that a score is linear in the stream.

At a receiving layer r the router sees gamma_r * x / s_r, with x the residual stream `hook_resid_mid` and s_r
its scale `ln2.hook_scale`. With the readout R_r = W_r diag(gamma_r), its logits are R_r x / s_r: a sum over
whatever x is a sum of. No family here has a router bias, so nothing else is in the logits.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moe_lens.model.hooked_moe import HookedMoE


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
