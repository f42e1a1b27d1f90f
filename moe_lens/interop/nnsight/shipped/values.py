"""The values of hook points (`moe_lens.model` names them), read from a transformers model as it runs.

Values must be read in the order in which the model makes them, so these functions follow its forward pass: embedding,
layer by layer, final norm. A value is read only where it is wanted; the names that there are, `moe_lens.interop.points`
lists. All five families have `lm.model`
with its `embed_tokens`, `layers` and `norm`.

What transformers keeps flat, `[batch x pos, ...]`, is given its two axes; slots are sorted by routing weight, heaviest
first; each slot's expert output is what the layer's own experts make of it alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_lens.interop.nnsight.shipped.attention import read_attention
from moe_lens.interop.nnsight.shipped.weights import expert_outputs, neurons_of


def read_values(lm: Any, facts: dict[str, Any], wanted: list[str], shape: list[int]) -> dict[str, Tensor]:
    """The values of hook points of one run, by name.

    Args:
        lm: the model's envoy.
        facts: of the model.
        wanted: names; no other value is read.
        shape: batch and positions of the run.
    """
    values = {}
    model, names = lm.model, set(wanted)
    if "hook_embed" in names:
        values["hook_embed"] = model.embed_tokens.output.detach()
    for layer in range(facts["n_layers"]):
        prefix = f"blocks.{layer}."
        here = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        if here:
            found = read_layer(model.layers[layer], facts, layer in facts["moe_layers"], here, shape)
            values.update({prefix + name: value for name, value in found.items()})
    final = {name.removeprefix("ln_final.") for name in names if name.startswith("ln_final.")}
    if final:
        found = normalised(model.norm.input.detach(), facts["eps"])
        values.update({f"ln_final.{name}": found[name] for name in final})
    return values


def read_layer(
    layer: Any, facts: dict[str, Any], has_experts: bool, wanted: set[str], shape: list[int]
) -> dict[str, Tensor]:
    """The values of one layer, by their names in it."""
    values = {}
    if wanted & {"hook_resid_pre", "ln1.hook_scale", "ln1.hook_normalized"}:
        stream = layer.input.detach()
        found = normalised(stream, facts["eps"])
        values["hook_resid_pre"] = stream
        values["ln1.hook_scale"], values["ln1.hook_normalized"] = (
            found["hook_scale"],
            found["hook_normalized"],
        )
    values.update(read_attention(layer.self_attn, facts, wanted))
    if wanted & {"hook_resid_mid", "ln2.hook_scale", "ln2.hook_normalized"}:
        stream = layer.post_attention_layernorm.input.detach()
        found = normalised(stream, facts["eps"])
        values["hook_resid_mid"] = stream
        values["ln2.hook_scale"], values["ln2.hook_normalized"] = (
            found["hook_scale"],
            found["hook_normalized"],
        )
    in_mlp = {name.removeprefix("mlp.") for name in wanted if name.startswith("mlp.")}
    if in_mlp:
        read = read_experts if has_experts else read_gated_mlp
        values.update({f"mlp.{name}": v for name, v in read(layer.mlp, facts, in_mlp, shape).items()})
    if "hook_mlp_out" in wanted:
        values["hook_mlp_out"] = layer.mlp.output.detach().reshape(*shape, -1)
    if "hook_resid_post" in wanted:
        values["hook_resid_post"] = layer.output.detach()
    return {name: value for name, value in values.items() if name in wanted}


def normalised(stream: Tensor, eps: float) -> dict[str, Tensor]:
    """RMSNorm's scale, sqrt(mean(x^2) + eps) in float32, and the stream over it, before the gain."""
    with torch.autocast(stream.device.type, enabled=False):
        scale = (stream.float().pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()
        return {"hook_scale": scale, "hook_normalized": (stream.float() / scale).to(stream.dtype)}


# ---- experts ----


def read_experts(mlp: Any, facts: dict[str, Any], wanted: set[str], shape: list[int]) -> dict[str, Tensor]:
    """What router, experts and shared experts of one layer make."""
    shared, values = facts["shared"], {}
    of_shared = {name for name in wanted if name.startswith("hook_shared")}
    # The family with a gate on its shared expert runs it before its router, the other after its experts.
    if of_shared and shared["gated"]:
        values.update(read_shared(mlp.shared_expert, of_shared, shape))
    if wanted & {"hook_router_logits", "hook_expert_weights"}:
        logits = mlp.gate.output[0].detach().reshape(*shape, -1)
        values["hook_router_logits"] = logits
        values["hook_expert_weights"] = logits.float().softmax(dim=-1)
    of_slots = {"hook_expert_indices", "hook_routing_weights"} | OUTPUTS | NEURONS
    if wanted & of_slots:
        x, indices, weights = mlp.experts.inputs[0]
        found = slot_values(mlp.experts, x.detach(), indices, weights.detach(), wanted)
        values.update({name: value.reshape(*shape, *value.shape[1:]) for name, value in found.items()})
    if of_shared and shared["gated"]:
        out = values["hook_shared_out"]
        gate = mlp.shared_expert_gate.output.detach().reshape(*shape, 1).sigmoid()
        values["hook_shared_gate"], values["hook_shared_out"] = gate, gate * out
    elif of_shared:
        values.update(read_shared(mlp.shared_experts, of_shared, shape))
    return {name: value for name, value in values.items() if name in wanted}


NEURONS = {"hook_expert_pre", "hook_expert_pre_linear", "hook_expert_post"}
OUTPUTS = {"hook_expert_out", "hook_expert_contrib"}


def slot_values(
    experts: Any, x: Tensor, indices: Tensor, weights: Tensor, wanted: set[str]
) -> dict[str, Tensor]:
    """What the router chose, `[token, k]`, heaviest first, and what each slot's expert makes, `[token, k, d]`."""
    order = weights.argsort(dim=-1, descending=True, stable=True)
    indices, weights = indices.gather(-1, order), weights.gather(-1, order)
    values = {"hook_expert_indices": indices, "hook_routing_weights": weights}
    if wanted & OUTPUTS:
        out = expert_outputs(experts, x, indices, weights)
        values["hook_expert_out"] = out
        values["hook_expert_contrib"] = (weights[..., None] * out).to(out.dtype)
    if wanted & NEURONS:
        values.update(neurons_of(experts, x, indices))
    return {name: value for name, value in values.items() if name in wanted}


def read_shared(mlp: Any, wanted: set[str], shape: list[int]) -> dict[str, Tensor]:
    """Neurons and output of shared experts, before their gate."""
    found = read_gated_mlp(mlp, {}, {name.replace("shared_", "") for name in wanted}, shape)
    values = {name.replace("hook_", "hook_shared_"): value for name, value in found.items()}
    values["hook_shared_out"] = mlp.down_proj.output.detach().reshape(*shape, -1)
    return values


def read_gated_mlp(mlp: Any, facts: dict[str, Any], wanted: set[str], shape: list[int]) -> dict[str, Tensor]:
    """Neurons of a dense MLP: before the activation, what they are multiplied with, and their product."""
    values = {}
    if "hook_pre" in wanted:
        values["hook_pre"] = mlp.gate_proj.output.detach().reshape(*shape, -1)
    if "hook_pre_linear" in wanted:
        values["hook_pre_linear"] = mlp.up_proj.output.detach().reshape(*shape, -1)
    if "hook_post" in wanted:
        values["hook_post"] = mlp.down_proj.input.detach().reshape(*shape, -1)
    return values
