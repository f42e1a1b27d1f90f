"""The scores of what components wrote, made from a transformers model as it runs: router logits and token logits.

What `moe_lens.routing.attribution` and `moe_lens.routing.logit_attribution` make of a cache, is here made while the
forward pass goes on, one component after the other: its hook values are read, its senders are scored on the device
where they lie, and only scores are kept. The formulas are those of `moe_lens.routing.writes` (the same rows read all
tokens, as a router does), `moe_lens.routing.token_scores` (every token has a direction of its own, as a logit does) and
`moe_lens.routing.rounding`; tests hold each against them.

A *group* is a `moe_lens.routing.senders.SenderGroup` as plain values: `layer`, `kind`, `written_at`, and `hooks`, the
hook points that are read, `written_at` among them. Its *values* are by the last part of their names (`hook_z`), its
*weights* by the names that HookedMoE gives them.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor

from moe_lens.interop.nnsight.shipped.values import read_values
from moe_lens.interop.nnsight.shipped.weights import bias_of, gain_of, matrix_of, readout_of

# ---- what is asked for ----


def router_scores(
    lm: Any, facts: dict[str, Any], groups: list[dict[str, Any]], receiver: int, shape: list[int]
) -> dict[str, Tensor]:
    """What `router_logit_attrs` of a trace is made of.

    Args:
        lm: the model's envoy.
        facts: of the model.
        groups: the senders before the router, in the stream's order.
        receiver: the router's layer.
        shape: batch and positions of the run.

    Returns:
        `values` `[sender, batch, pos, expert]`, with `rounding` last where something rounds; `logits` `[batch, pos,
        expert]`; `model_logit_difference` `[batch, pos]`, the largest over experts; and where something rounds
        `rounding_ratio` `[batch, pos]`, the largest over coordinates.
    """
    embed = read_values(lm, facts, ["hook_embed"], shape)["hook_embed"]
    readout = readout_of(lm.model.layers[receiver], embed)
    scores, written = read_senders(lm, facts, groups, shape, embed, None, readout)

    prefix = f"blocks.{receiver}."
    names = ["hook_resid_mid", "ln2.hook_scale", "mlp.hook_router_logits"]
    found = read_values(lm, facts, [prefix + name for name in names], shape)
    stream, scale, by_model = (found[prefix + name] for name in names)
    with torch.no_grad(), torch.autocast(stream.device.type, enabled=False):
        scores, ratio = with_rounding(scores, written, stream, readout)
        logits = score_on_rows(stream, readout) / scale
        difference = (logits - by_model.to(logits.device).float()).abs().amax(dim=-1)
        return {"values": scores / scale, "logits": logits, "model_logit_difference": difference, **ratio}


def token_scores(
    lm: Any,
    facts: dict[str, Any],
    groups: list[dict[str, Any]],
    columns: list[list[int]],
    tokens: list[list[int]],
    incorrect: list[list[int]] | None,
    shape: list[int],
) -> dict[str, Tensor]:
    """What `logit_attrs` of a trace is made of.

    Args:
        lm, facts, shape: as in `router_scores`.
        groups: all senders, in the stream's order.
        columns: of each row, the positions that are read.
        tokens, incorrect: whose logits are read there, and whose are subtracted.

    Returns:
        As `router_scores`, at the positions asked for and without the axis of experts.
    """
    norm, embed = lm.model.norm, read_values(lm, facts, ["hook_embed"], shape)["hook_embed"]
    rows = rows_of(lm.lm_head, tokens, embed)
    subtracted = None if incorrect is None else rows_of(lm.lm_head, incorrect, embed)
    gain = gain_of(norm, embed)
    directions = gain * (rows if subtracted is None else rows - subtracted)
    scores, written = read_senders(lm, facts, groups, shape, embed, columns, directions)

    names = [f"blocks.{facts['n_layers'] - 1}.hook_resid_post", "ln_final.hook_scale"]
    found = read_values(lm, facts, names, shape)
    stream, scale = (at_columns(found[name], columns) for name in names)
    normed = at_columns(norm.output.detach(), columns)
    with torch.no_grad(), torch.autocast(stream.device.type, enabled=False):
        scores, ratio = with_rounding(scores, written, stream, directions)
        scale = scale[..., 0]
        logits = score_along(stream, directions) / scale
        dtype = lm.lm_head.weight.dtype
        by_model = score_along(normed, rows).to(dtype).float()
        if subtracted is not None:
            by_model = by_model - score_along(normed, subtracted).to(dtype).float()
        difference = (logits - by_model.to(logits.device)).abs()
        return {"values": scores / scale, "logits": logits, "model_logit_difference": difference, **ratio}


# ---- senders ----


def read_senders(
    lm: Any,
    facts: dict[str, Any],
    groups: list[dict[str, Any]],
    shape: list[int],
    embed: Tensor,
    columns: list[list[int]] | None,
    read: Tensor,
) -> tuple[list[Tensor], dict[str, Any] | None]:
    """The scores of every group, not yet divided by a scale, and, where something rounds, what they have written.

    Args:
        embed: the embedding, which has been read already: the first sender.
        columns: of each row, the positions that are scored; None: all.
        read: rows `[row, d_model]` that read every token, or directions `[batch, pos, d_model]`, in float32.
    """
    roundoff, scores, written = unit_roundoff(embed), [], None
    for group in groups:
        first = group["layer"] is None
        found = {"hook_embed": embed} if first else read_values(lm, facts, group["hooks"], shape)
        values = {name.rpartition(".")[2]: at_columns(value, columns, name) for name, value in found.items()}
        values["written"] = at_columns(found[group["written_at"]], columns)
        weights, device = weights_of(lm, facts, group, values), values["written"].device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            scored = group_on_rows if read.ndim == 2 else group_along
            scores.append(scored(group, values, weights, read.to(device), facts["n_experts"]))
            if roundoff is not None:
                written = added(written, roundoff, *written_by(group, values, weights))
    return scores, written


def weights_of(
    lm: Any, facts: dict[str, Any], group: dict[str, Any], values: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The weights with which a group's senders write: an expert's or a neuron's, `[..., d_model, neuron]`."""
    kind = group["kind"]
    if kind in ("whole", "experts"):
        return {}
    layer, like = lm.model.layers[group["layer"]], values["written"]
    if kind in ("heads", "sources"):
        out = layer.self_attn.o_proj
        weight = rearrange(matrix_of(out, like), "d_model (head d) -> head d d_model", head=facts["n_heads"])
        bias = bias_of(out, like)
        return {"W_O": weight} if bias is None else {"W_O": weight, "b_O": bias}
    if kind == "dense neurons":
        return {"W_down": matrix_of(layer.mlp.down_proj, like)}
    # Where the experts' weights are not at hand, their neurons were not either, and that has raised.
    weights = {"W_down": layer.mlp.experts.down_proj.detach()}
    if facts["shared"] is not None:
        shared = layer.mlp.shared_expert if facts["shared"]["gated"] else layer.mlp.shared_experts
        weights["shared_W_down"] = matrix_of(shared.down_proj, like)
    return weights


def rows_of(unembed: Any, tokens: list[list[int]], like: Tensor) -> Tensor:
    """The unembedding's rows of tokens, in float32 on the device of `like`."""
    weight = matrix_of(unembed, like) if unembed.weight.is_meta else unembed.weight.detach()
    return weight[torch.tensor(tokens, device=weight.device)].to(like.device).float()


def head_values(values: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    """hook_v with grouped queries' values repeated, `[batch, pos, head, d]`."""
    value, n_heads = values["hook_v"].float(), len(weights["W_O"])
    return repeat(value, "b p kv_head d -> b p (kv_head group) d", group=n_heads // value.shape[2])


def routed_neurons(values: dict[str, Tensor]) -> Tensor:
    """g_i a_n, what multiplies a neuron's column, `[batch, pos, k, neuron]`."""
    return values["hook_routing_weights"].float()[..., None] * values["hook_expert_post"].float()


def shared_neurons(values: dict[str, Tensor]) -> Tensor:
    """The same of the shared experts, `[batch, pos, neuron]`."""
    post = values["hook_shared_post"].float()
    return values["hook_shared_gate"].float() * post if "hook_shared_gate" in values else post


def scattered(slots: Tensor, indices: Tensor, n_experts: int) -> Tensor:
    """Slots `[batch, pos, k, ...]` in the places of their experts, `[expert, batch, pos, ...]`; 0 at the others."""
    out = slots.new_zeros(*indices.shape[:2], n_experts, *slots.shape[3:])
    index = indices.reshape(*indices.shape, *[1] * (slots.ndim - 3)).expand_as(slots)
    return out.scatter_(2, index, slots).movedim(2, 0)


def at_columns(value: Tensor, columns: list[list[int]] | None, name: str = "") -> Tensor:
    """A hook value at each row's columns. What is attended to stays whole: values, and the keys of the pattern."""
    if columns is None or name.endswith("attn.hook_v"):
        return value
    rows = torch.arange(len(value), device=value.device)[:, None]
    places = torch.tensor(columns, device=value.device)
    if name.endswith("attn.hook_pattern"):
        return value.transpose(1, 2)[rows, places].transpose(1, 2)
    return value[rows, places]


# ---- scores, in float32 and not yet divided by a scale ----


def score_on_rows(vectors: Tensor, readout: Tensor) -> Tensor:
    return vectors.float() @ readout.to(vectors.device).T


def score_along(vectors: Tensor, directions: Tensor) -> Tensor:
    return einsum(vectors.float(), directions.to(vectors.device), "b p d_model, b p d_model -> b p")


def group_on_rows(
    group: dict[str, Any],
    values: dict[str, Tensor],
    weights: dict[str, Tensor],
    readout: Tensor,
    n_experts: int,
) -> Tensor:
    """Every sender's product with every row of a readout, `[sender, batch, pos, row]`."""
    kind = group["kind"]
    if kind == "whole":
        return score_on_rows(values["written"], readout)[None]
    if kind in ("heads", "sources"):
        through = einsum(weights["W_O"].float(), readout, "head d d_model, row d_model -> head d row")
        if kind == "heads":
            scores = einsum(values["hook_z"].float(), through, "b p head d, head d row -> head b p row")
        else:
            read = einsum(head_values(values, weights), through, "b k head d, head d row -> b head k row")
            scores = einsum(
                values["hook_pattern"].float(), read, "b head q k, b head k row -> head k b q row"
            )
            scores = rearrange(scores, "head k b q row -> (head k) b q row")
        if "b_O" not in weights:
            return scores
        bias = score_on_rows(weights["b_O"], readout).expand(1, *scores.shape[1:])
        return torch.cat((scores, bias))
    if kind == "dense neurons":
        return neurons_on_rows(values["hook_post"].float(), weights["W_down"], readout)
    indices = values["hook_expert_indices"]
    if kind == "experts":
        scores = scattered(score_on_rows(values["hook_expert_contrib"], readout), indices, n_experts)
        if "hook_shared_out" not in values:
            return scores
        return torch.cat((scores, score_on_rows(values["hook_shared_out"], readout)[None]))
    neurons = routed_neurons(values)
    scores = neurons.new_zeros(n_experts, neurons.shape[-1], *indices.shape[:2], len(readout))
    for expert in indices.unique().tolist():
        batch, pos, slot = (indices == expert).nonzero(as_tuple=True)
        read = readout @ weights["W_down"][expert].float()
        scores[expert][:, batch, pos] = einsum(
            neurons[batch, pos, slot], read, "slot neuron, row neuron -> neuron slot row"
        )
    scores = rearrange(scores, "expert neuron b p row -> (expert neuron) b p row")
    if "shared_W_down" not in weights:
        return scores
    return torch.cat((scores, neurons_on_rows(shared_neurons(values), weights["shared_W_down"], readout)))


def neurons_on_rows(neurons: Tensor, columns: Tensor, readout: Tensor) -> Tensor:
    return einsum(neurons, readout @ columns.float(), "b p neuron, row neuron -> neuron b p row")


def group_along(
    group: dict[str, Any],
    values: dict[str, Tensor],
    weights: dict[str, Tensor],
    directions: Tensor,
    n_experts: int,
) -> Tensor:
    """Every sender's product with its token's direction, `[sender, batch, pos]`."""
    kind = group["kind"]
    if kind == "whole":
        return score_along(values["written"], directions)[None]
    if kind in ("heads", "sources"):
        through = einsum(directions, weights["W_O"].float(), "b p d_model, head d d_model -> b p head d")
        if kind == "heads":
            scores = einsum(values["hook_z"].float(), through, "b p head d, b p head d -> head b p")
        else:
            read = einsum(head_values(values, weights), through, "b k head d, b q head d -> b head q k")
            scores = rearrange(values["hook_pattern"].float() * read, "b head q k -> (head k) b q")
        if "b_O" not in weights:
            return scores
        return torch.cat((scores, (directions @ weights["b_O"].float())[None]))
    if kind == "dense neurons":
        return neurons_along(values["hook_post"].float(), weights["W_down"], directions)
    indices = values["hook_expert_indices"]
    if kind == "experts":
        contributions = values["hook_expert_contrib"].float()
        slots = einsum(contributions, directions, "b p k d_model, b p d_model -> b p k")
        scores = scattered(slots, indices, n_experts)
        if "hook_shared_out" not in values:
            return scores
        return torch.cat((scores, score_along(values["hook_shared_out"], directions)[None]))
    slots = routed_neurons(values)
    for expert in indices.unique().tolist():
        batch, pos, slot = (indices == expert).nonzero(as_tuple=True)
        slots[batch, pos, slot] *= directions[batch, pos] @ weights["W_down"][expert].float()
    scores = scattered(slots, indices, n_experts)
    scores = rearrange(scores, "expert b p neuron -> (expert neuron) b p")
    if "shared_W_down" not in weights:
        return scores
    return torch.cat((scores, neurons_along(shared_neurons(values), weights["shared_W_down"], directions)))


def neurons_along(neurons: Tensor, columns: Tensor, directions: Tensor) -> Tensor:
    return rearrange(neurons * (directions @ columns.float()), "b p neuron -> neuron b p")


# ---- rounding: `StreamSum` and `written_by`, as plain functions ----


def unit_roundoff(embed: Tensor) -> float | None:
    """The coarsest rounding of the stream, which begins with the embedding, and of what is added to it, which a
    server's autocast may round; None where all is single precision."""
    dtypes = [embed.dtype]
    if torch.is_autocast_enabled(embed.device.type):
        dtypes.append(torch.get_autocast_dtype(embed.device.type))
    half = [torch.finfo(dtype).eps / 2 for dtype in dtypes if dtype in (torch.bfloat16, torch.float16)]
    return max(half) if half else None


def written_by(
    group: dict[str, Any], values: dict[str, Tensor], weights: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """The sum of a group's senders, and the sum of the sizes that were rounded on the way to it; None of a whole
    component."""
    kind, written = group["kind"], values["written"].float()
    if kind == "whole":
        return written, None
    if kind in ("heads", "sources"):
        weight = weights["W_O"].float()
        if kind == "heads":
            z = values["hook_z"].float()
        else:
            read = head_values(values, weights)
            z = einsum(values["hook_pattern"].float(), read, "b head q k, b k head d -> b q head d")
        vector = einsum(z, weight, "b p head d, head d d_model -> b p d_model")
        sizes = einsum(z.abs(), weight.abs(), "b p head d, head d d_model -> b p d_model")
        if "b_O" in weights:
            vector = vector + weights["b_O"].float()
        return vector, 2 * sizes + written.abs()
    if kind == "dense neurons":
        vector = values["hook_post"].float() @ weights["W_down"].float().T
        return vector, vector.abs() + written.abs()
    if kind == "experts":
        routed, times = values["hook_expert_contrib"].float(), 1
        shared = values["hook_shared_out"].float() if "hook_shared_out" in values else None
    else:
        routed, times = routed_outputs(values, weights["W_down"]), 4
        shared = None
        if "shared_W_down" in weights:
            shared = shared_neurons(values) @ weights["shared_W_down"].float().T
    vector, sizes = routed.sum(dim=2), routed.abs().sum(dim=2)
    if shared is not None:
        vector, sizes = vector + shared, sizes + shared.abs()
    return vector, times * sizes + written.abs()


def routed_outputs(values: dict[str, Tensor], columns: Tensor) -> Tensor:
    """The sum of the neurons of each slot, `[batch, pos, k, d_model]`."""
    neurons, indices = routed_neurons(values), values["hook_expert_indices"]
    out = neurons.new_zeros(*indices.shape, columns.shape[1])
    for expert in indices.unique().tolist():
        places = (indices == expert).nonzero(as_tuple=True)
        out[places] = neurons[places] @ columns[expert].float().T
    return out


def added(
    written: dict[str, Any] | None, roundoff: float, vector: Tensor, rounded_inside: Tensor | None
) -> dict[str, Any]:
    """The senders' sum so far, in float32, and the sum of the sizes of all that was rounded in it."""
    if written is None:
        return {"total": vector, "rounded": torch.zeros_like(vector), "roundoff": roundoff}
    device = written["total"].device
    total = written["total"] + vector.to(device)
    rounded = written["rounded"] + total.abs()
    if rounded_inside is not None:
        rounded = rounded + rounded_inside.to(device)
    return {"total": total, "rounded": rounded, "roundoff": roundoff}


def with_rounding(
    scores: list[Tensor], written: dict[str, Any] | None, stream: Tensor, read: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """All scores on the stream's device, with those of `rounding` where something rounds; and then its ratio to the
    most that it can be."""
    ratio = {}
    scores = [part.to(stream.device) for part in scores]
    if written is not None:
        rounding = stream.float() - written["total"].to(stream.device)
        sizes = written["rounded"].to(stream.device) + torch.finfo(torch.float16).tiny
        ratio["rounding_ratio"] = (rounding.abs() / (2 * written["roundoff"] * sizes)).amax(dim=-1)
        score = score_on_rows if read.ndim == 2 else score_along
        scores.append(score(rounding, read)[None])
    return torch.cat(scores), ratio
