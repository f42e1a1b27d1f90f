"""What attention makes and writes, read from a transformers model as it runs.

What happens inside the kernel (rotation, scores, pattern) is computed again, as `moe_lens.model` computes it, from the
queries and keys that go in; a pattern is held against what came out, z, and one that does not make it raises.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor

from moe_lens.interop.nnsight.shipped.weights import matrix_of


def read_attention(attention: Any, facts: dict[str, Any], wanted: set[str]) -> dict[str, Tensor]:
    """The values of one attention layer, by their names in its block; some that are not wanted may be among them."""
    scored = wanted & {"attn.hook_attn_scores", "attn.hook_pattern"}
    rotated = scored or wanted & {"attn.hook_rot_q", "attn.hook_rot_k"}
    values = {}
    if rotated or wanted & {"attn.hook_q", "attn.hook_k", "attn.hook_v"}:
        read = read_grouped if facts["latent"] is None else read_latent
        found = read(attention, facts, bool(rotated))
        values.update({f"attn.hook_{name}": found[name] for name in ("q", "k", "v")})
        if rotated:
            values["attn.hook_rot_q"] = rotate(found["to_rotate_q"], facts["rotation"])
            values["attn.hook_rot_k"] = rotate(found["to_rotate_k"], facts["rotation"])
    if scored:
        scores, pattern = scores_and_pattern(values["attn.hook_rot_q"], values["attn.hook_rot_k"], facts)
        values["attn.hook_attn_scores"], values["attn.hook_pattern"] = scores, pattern
    if scored or wanted & {"attn.hook_z", "attn.hook_result"}:
        z = rearrange(attention.o_proj.input.detach(), "b p (head d) -> b p head d", head=facts["n_heads"])
        values["attn.hook_z"] = z
        if scored:
            check_pattern(values["attn.hook_pattern"], values["attn.hook_v"], z, facts)
        if "attn.hook_result" in wanted:
            weight = matrix_of(attention.o_proj, z).to(z.dtype)
            weight = rearrange(weight, "d_model (head d) -> head d d_model", head=facts["n_heads"])
            with torch.autocast(z.device.type, enabled=False):
                values["attn.hook_result"] = einsum(
                    z, weight, "b p head d, head d d_model -> b p head d_model"
                )
    if "hook_attn_out" in wanted:
        values["hook_attn_out"] = attention.o_proj.output.detach()
    return values


def read_grouped(attention: Any, facts: dict[str, Any], rotated: bool) -> dict[str, Tensor]:
    """Queries and keys as they are projected, and as they are when they are rotated: after norm and clip; values as
    they are attended to."""
    clip, normed = facts["clip"], facts["query_key_norm"] and rotated
    found = {}
    for name, n in (("q", facts["n_heads"]), ("k", facts["n_key_value_heads"])):
        projected = getattr(attention, f"{name}_proj").output.detach()
        after = getattr(attention, f"{name}_norm").output.detach() if normed else projected
        found[name] = rearrange(projected, "b p (h d) -> b p h d", h=n)
        after = after.reshape(*found[name].shape)
        found[f"to_rotate_{name}"] = after if clip is None else after.clamp(-clip, clip)
    value = rearrange(attention.v_proj.output.detach(), "b p (h d) -> b p h d", h=facts["n_key_value_heads"])
    found["v"] = value if clip is None else value.clamp(-clip, clip)
    return found


def read_latent(attention: Any, facts: dict[str, Any], rotated: bool) -> dict[str, Tensor]:
    """The same of latent attention: [nope | rope] of every head, the shared rotary key repeated."""
    latent, n_heads = facts["latent"], facts["n_heads"]
    projection = attention.q_b_proj if latent["query_rank"] else attention.q_proj
    query = rearrange(projection.output.detach(), "b p (head d) -> b p head d", head=n_heads)
    compressed = attention.kv_a_proj_with_mqa.output.detach()
    # Made with an axis of one head, at which transformers keeps what all heads share.
    expanded = attention.kv_b_proj.output.detach().reshape(*compressed.shape[:2], n_heads, -1)
    nope, value = expanded.split((latent["d_nope"], facts["d_value"]), dim=-1)
    rope = repeat(compressed[..., latent["kv_rank"] :], "b p d -> b p head d", head=n_heads)
    key = torch.cat((nope, rope.to(nope.dtype)), dim=-1)
    # In memory of its own: what is sent of a tensor is all the memory that it lies in.
    return {"q": query, "k": key, "v": value.contiguous(), "to_rotate_q": query, "to_rotate_k": key}


def rotate(x: Tensor, rotation: dict[str, Any]) -> Tensor:
    """Rotary position embedding of `[batch, pos, head, d]`, of the last coordinates that it turns."""
    cos, sin = (rotation[name].to(x.device)[:, :, None] for name in ("cos", "sin"))
    still, turned = x.split((x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]), dim=-1)
    with torch.autocast(x.device.type, enabled=False):
        if rotation["adjacent"]:
            first, second = rearrange(turned.float(), "b p h (pair two) -> two b p h pair", two=2)
        else:
            first, second = turned.float().chunk(2, dim=-1)
        pair = (first * cos - second * sin, second * cos + first * sin)
        turned = torch.stack(pair, dim=-1).flatten(-2) if rotation["adjacent"] else torch.cat(pair, dim=-1)
    return torch.cat((still, turned.to(x.dtype)), dim=-1)


def scores_and_pattern(query: Tensor, key: Tensor, facts: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """`[batch, head, query, key]`; a padded query sees itself alone, and is seen by nobody."""
    real = facts["real"].to(query.device)
    key = repeat(key, "b k h d -> b (h group) k d", group=facts["n_heads"] // key.shape[2])
    columns = torch.arange(real.shape[1], device=query.device)
    itself, causal = columns[:, None] == columns, columns[:, None] >= columns
    visible = (causal & real[:, None, :] & real[:, :, None]) | itself
    with torch.autocast(query.device.type, enabled=False):
        scores = rearrange(query, "b q head d -> b head q d") @ key.transpose(-1, -2) * facts["softmax_scale"]
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
        return scores, scores.float().softmax(dim=-1).to(query.dtype)


def check_pattern(pattern: Tensor, value: Tensor, z: Tensor, facts: dict[str, Any]) -> None:
    """Raise where a pattern is not that with which the model made z at a real token."""
    real = facts["real"].to(z.device)
    value = repeat(value, "b k h d -> b (h group) k d", group=facts["n_heads"] // value.shape[2])
    with torch.autocast(z.device.type, enabled=False):
        again = rearrange(pattern.float() @ value.float(), "b head q d -> b q head d")
        error = float((again - z.float())[real].abs().max() / value.float().abs().max())
    # The kernel may keep the pattern in the model's precision; a wrong mask or angle is far beyond that.
    limit = max(1e-4, 4 * torch.finfo(z.dtype).eps)
    if not error <= limit:
        raise RuntimeError(
            f"attention's pattern, computed again, does not make the model's z: relative error {error:.1e}, over "
            f"{limit:.1e}; the model attends in another way than its config says"
        )
