"""Scores of the senders of one component where every token has a direction of its own.

`moe_lens.routing.writes.sender_scores` reads all tokens with the same few rows, as a router does. A logit of the next
token is read along another column of the unembedding at every token, so here a sender's score is its product with
its own token's direction u, and only that is made: no [sender, batch, pos, vocabulary]. Directions are carried back
through the weights, and so a head costs d_head and a neuron one number:

    head    z_h . (W_O^h u)                  source   A[q, p] v_p . (W_O^h u_q)
    expert  g_i E_i(x) . u                   neuron   g_i a_n (W_down[:, n] . u)
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from moe_lens.model.expert_matmul import SlotOrder, expert_matmul
from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.mlp import DenseMLP, GatedMLP
from moe_lens.model.moe import MoE
from moe_lens.routing.senders import SenderGroup
from moe_lens.routing.writes import (
    GroupValues,
    Values,
    attention_of,
    head_values,
    mlp_of,
    reading_weights,
    routed_neurons,
    scattered,
    shared_neurons,
)


def along(
    vectors: Float[Tensor, "batch pos d_model"], directions: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos"]:
    """Each token's vector along its own direction, in float32."""
    return einsum(vectors.float(), directions, "b p d_model, b p d_model -> b p")


@reading_weights
def scores_along(
    model: HookedMoE, group: SenderGroup, values: Values, directions: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "sender batch pos"]:
    """Every sender's product with its token's direction, in float32, not yet divided by the reader's scale.

    Args:
        group: senders of one component.
        values: its hook values (`hooks_of`) at the directions' places; of sources, `hook_v` at all of them.
        directions: in float32.
    """
    of = GroupValues(group, values)
    match group.kind:
        case "whole":
            return along(values[group.written_at], directions)[None]
        case "heads" | "sources":
            attention = attention_of(model, group.layer)
            through = einsum(
                directions,
                attention.W_O.detach().float(),
                "b p d_model, head d_value d_model -> b p head d_value",
            )
            if group.kind == "heads":
                z = of.at("hook_z").float()
                scores = einsum(z, through, "b p head d_value, b p head d_value -> head b p")
            else:
                read = einsum(
                    head_values(attention, of.at("hook_v")),
                    through,
                    "b k head d_value, b q head d_value -> b head q k",
                )
                scores = rearrange(of.at("hook_pattern").float() * read, "b head q k -> (head k) b q")
            if len(group.names) == 1:
                return scores
            return torch.cat((scores, (directions @ attention.b_O.detach().float())[None]))
        case "experts":
            contributions = of.at("hook_expert_contrib").float()
            slots = einsum(contributions, directions, "b p k d_model, b p d_model -> b p k")
            scores = scattered(slots, of.at("hook_expert_indices"), model.cfg.n_experts)
            if model.cfg.shared is None:
                return scores
            return torch.cat((scores, along(of.at("hook_shared_out"), directions)[None]))
        case "neurons":
            mlp = mlp_of(model, group.layer)
            assert isinstance(mlp, MoE)
            indices = of.at("hook_expert_indices")
            slots = SlotOrder.of(indices, model.cfg.n_experts)
            columns = rearrange(mlp.experts.W_down.detach().float(), "e neuron d_model -> e d_model neuron")
            read = slots.restore(expert_matmul(slots.gather(directions), columns, slots.ends))
            scores = scattered(routed_neurons(of) * read, indices, model.cfg.n_experts)
            scores = rearrange(scores, "expert b p neuron -> (expert neuron) b p")
            if mlp.shared is None:
                return scores
            return torch.cat((scores, _neurons_along(shared_neurons(model, of), mlp.shared, directions)))
        case "dense neurons":
            mlp = mlp_of(model, group.layer)
            assert isinstance(mlp, DenseMLP)
            return _neurons_along(of.at("hook_post").float(), mlp, directions)


def _neurons_along(
    neurons: Float[Tensor, "batch pos neuron"], mlp: GatedMLP, directions: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "neuron batch pos"]:
    return rearrange(neurons * (directions @ mlp.W_down.detach().float().T), "b p neuron -> neuron b p")
