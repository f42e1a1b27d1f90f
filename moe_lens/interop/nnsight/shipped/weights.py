"""The weights that a computation needs, also where they are not.

A server may run a block beside the model's weights, or, for a key that it does not trust, in a process of its own.
There every parameter has a shape and no values, and products with it are silently nothing; but modules can be called. A
linear map is what it makes of the identity, and a norm's gain what it makes of a constant, exactly: each product is
with 1 or 0. What no call gives, neurons, raises.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor


def matrix_of(linear: Any, like: Tensor) -> Tensor:
    """A linear module's (or a router's) weight, `[out, in]`, in float32 on the device of `like`.

    Args:
        like: a value in the dtype that the module is given; a module without weights may not say it.
    """
    weight = linear.weight
    if not weight.is_meta:
        return weight.detach().to(like.device).float()
    with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        made = linear(torch.eye(weight.shape[1], dtype=like.dtype, device=like.device))
        # A router gives its logits first.
        made = made[0] if isinstance(made, tuple) else made
        bias = bias_of(linear, like)
        if bias is not None and like.dtype != torch.float32:
            raise RuntimeError(
                "this key reaches no weights, and of a linear map with a bias in half precision its weight cannot be "
                "told from its outputs"
            )
        return (made if bias is None else made - bias).detach().float().T


def bias_of(linear: Any, like: Tensor) -> Tensor | None:
    """A linear module's bias in float32; None where it has none."""
    bias = getattr(linear, "bias", None)
    if bias is None:
        return None
    if not bias.is_meta:
        return bias.detach().to(like.device).float()
    with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        zero = torch.zeros(1, linear.weight.shape[1], dtype=like.dtype, device=like.device)
        return linear(zero)[0].detach().float()


def gain_of(norm: Any, like: Tensor) -> Tensor:
    """An RMSNorm's gain in float32 on the device of `like`; eps is far below 1."""
    weight = norm.weight
    if not weight.is_meta:
        return weight.detach().to(like.device).float()
    with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        # Large beside eps, so that x / sqrt(mean(x^2) + eps) is 1 to the last bit.
        large = torch.full((1, weight.shape[0]), 1024.0, dtype=like.dtype, device=like.device)
        return norm(large)[0].detach().float()


def readout_of(layer: Any, like: Tensor) -> Tensor:
    """What a layer's router reads of the residual stream, `[expert, d_model]`: its weights times the norm's gain."""
    return matrix_of(layer.mlp.gate, like) * gain_of(layer.post_attention_layernorm, like)


def expert_outputs(experts: Any, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """E_i(x) of every slot, before its routing weight, `[token, k, d]`: the layer's own experts, given each slot as a
    token of one expert, with weight 1.

    Args:
        weights: as the experts are given them; their dtype is read.
    """
    k = indices.shape[-1]
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        slots = experts(
            repeat(x, "token d -> (token k) d", k=k),
            rearrange(indices, "token k -> (token k) 1"),
            torch.ones_like(rearrange(weights, "token k -> (token k) 1")),
        )
    return rearrange(slots.detach(), "(token k) d -> token k d", k=k)


def neurons_of(experts: Any, x: Tensor, indices: Tensor) -> dict[str, Tensor]:
    """Of every slot's neurons, `[token, k, d_expert]`: before the activation, what they are multiplied with, and their
    product."""
    gate_up = experts.gate_up_proj
    if gate_up.is_meta:
        raise RuntimeError(
            "experts' neurons are computed from their weights, and this key reaches none: the server runs the block "
            "apart from them; experts' outputs can be had"
        )
    slots = rearrange(indices, "token k -> (token k)")
    # Sorted by expert, so that each one's slots are read and written in one piece.
    by_expert = slots.argsort(stable=True)
    counts = slots.bincount(minlength=len(gate_up)).tolist()
    made = {"hook_expert_pre": [], "hook_expert_pre_linear": [], "hook_expert_post": []}
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        inputs = x[by_expert // indices.shape[1]].split(counts)
        for expert in [expert for expert, count in enumerate(counts) if count]:
            pre, pre_linear = (inputs[expert] @ gate_up[expert].detach().T).chunk(2, dim=-1)
            for of, part in zip(
                made.values(), (pre, pre_linear, experts.act_fn(pre) * pre_linear), strict=True
            ):
                of.append(part)
    # Each in memory of its own: what is sent of a tensor is all the memory that it lies in.
    values = {}
    for name, parts in made.items():
        sorted_parts = torch.cat(parts)
        value = torch.empty_like(sorted_parts)
        value[by_expert] = sorted_parts
        values[name] = rearrange(value, "(token k) d -> token k d", k=indices.shape[1])
    return values
