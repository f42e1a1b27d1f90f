"""The slow, obvious implementation: what every hook point means, written out.

`reference_run` walks through a transformers model of any of the five families one step at a time and hands
the value of every hook point to a `tap`, under its name and in its shape. It uses transformers' weights, and
its modules where no hook point lies inside them; everything else is plain arithmetic, one expert, one slot
and one head at a time. An edit replaces a value at its hook point, and whatever follows is computed from the
edited value: so this file also says what an edit does. Nothing of moe_lens is imported here.

    zero = {"blocks.0.hook_mlp_out": lambda value: 0 * value}
    logits, cache = reference_run(hf_model, tokens, attention_mask, edits=zero)

Axes: b batch, p position, h head, k slot of a chosen expert (heaviest first), e expert, d model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Edits = Mapping[str, Callable[[Tensor], Tensor]]
Cache = dict[str, Tensor]


class Tap:
    """Records the value at every hook point, after the edit if there is one."""

    def __init__(self, edits: Edits | None = None, prefix: str = "") -> None:
        self.prefix = prefix
        self.edits = dict(edits or {})
        self.values: Cache = {}

    def __call__(self, name: str, value: Tensor) -> Tensor:
        name = self.prefix + name
        assert name not in self.values, f"{name} was met twice"
        if name in self.edits:
            value = self.edits[name](value.clone())
        self.values[name] = value
        return value

    def within(self, prefix: str) -> Tap:
        """The same record, with a longer prefix to every name."""
        inner = Tap(prefix=self.prefix + prefix)
        inner.edits, inner.values = self.edits, self.values
        return inner


def reference_run(
    hf_model: Any, tokens: Tensor, attention_mask: Tensor | None = None, edits: Edits | None = None
) -> tuple[Tensor, Cache]:
    """Logits `[b p vocabulary]` and the value at every hook point; differentiable where the edits are."""
    tap = Tap(edits)
    real = torch.ones_like(tokens) if attention_mask is None else attention_mask
    visible = visible_keys(real.bool())
    model = hf_model.model

    residual = tap("hook_embed", model.embed_tokens(tokens))
    positions = torch.arange(tokens.shape[1]).unsqueeze(0)  # counted from the left edge, padding included
    rotary = model.rotary_emb(residual, positions)

    for index, layer in enumerate(model.layers):
        at = tap.within(f"blocks.{index}.")
        residual = at("hook_resid_pre", residual)
        normed = rms_norm(layer.input_layernorm, residual, at.within("ln1."))
        attend = latent_attention if hf_model.config.model_type == "deepseek_v2" else standard_attention
        residual = residual + at(
            "hook_attn_out", attend(layer.self_attn, normed, rotary, visible, at.within("attn."))
        )
        residual = at("hook_resid_mid", residual)
        normed = rms_norm(layer.post_attention_layernorm, residual, at.within("ln2."))
        feed_forward = mixture_of_experts if hasattr(layer.mlp, "experts") else dense_layer
        residual = residual + at(
            "hook_mlp_out", feed_forward(layer.mlp, hf_model.config, normed, at.within("mlp."))
        )
        residual = at("hook_resid_post", residual)

    logits = hf_model.lm_head(rms_norm(model.norm, residual, tap.within("ln_final.")))
    missed = set(tap.edits) - set(tap.values)
    assert not missed, f"no such hook point: {sorted(missed)}"
    return logits, tap.values


def reference_cache(hf_model: Any, tokens: Tensor, attention_mask: Tensor | None = None) -> Cache:
    """The value at every hook point of a plain forward pass."""
    with torch.no_grad():
        return reference_run(hf_model, tokens, attention_mask)[1]


def reference_logits(
    hf_model: Any, tokens: Tensor, attention_mask: Tensor | None = None, edits: Edits | None = None
) -> Tensor:
    """Logits of a forward pass, under edits if there are any."""
    with torch.no_grad():
        return reference_run(hf_model, tokens, attention_mask, edits)[0]


def reference_loss_per_token(hf_model: Any, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """`[b p-1]`, nats: minus the log probability of the next token; NaN where either of them is padding."""
    logits = reference_logits(hf_model, tokens, attention_mask)
    batch, length = tokens.shape
    loss = torch.full((batch, length - 1), float("nan"))
    for row in range(batch):
        for position in range(length - 1):
            if attention_mask is None or attention_mask[row, position : position + 2].all():
                log_probabilities = logits[row, position].float().log_softmax(-1)
                loss[row, position] = -log_probabilities[tokens[row, position + 1]]
    return loss


def assert_same(actual: Tensor, expected: Tensor, name: str = "", *, tolerance: float = 2e-5) -> None:
    """The same shape, integers and infinities, and finite entries equal relative to the largest of them."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), f"{name}: other integers"
        return
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{name}: not finite at the same places"
    assert torch.equal(actual[~finite], expected[~finite]), f"{name}: other infinities"
    size = expected[finite].abs().max().clamp(min=1e-6)
    error = (actual - expected)[finite].abs().max() / size
    assert error < tolerance, f"{name}: relative error {error:.1e}"


# --- what a query may see -----------------------------------------------------------------------------------


def visible_keys(real: Tensor) -> Tensor:
    """`[b q k]` bool: a real query sees the real keys up to itself; a padded query sees itself alone."""
    batch, length = real.shape
    visible = torch.zeros(batch, length, length, dtype=torch.bool)
    for row in range(batch):
        for query in range(length):
            for key in range(query + 1):
                visible[row, query, key] = (real[row, query] and real[row, key]) or query == key
    return visible


# --- norm ---------------------------------------------------------------------------------------------------


def rms_norm(norm: nn.Module, x: Tensor, tap: Tap) -> Tensor:
    """x over its root mean square, times the gain."""
    scale = tap("hook_scale", (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt())
    normalized = tap("hook_normalized", x / scale)
    return norm.weight * normalized


# --- attention ----------------------------------------------------------------------------------------------


def standard_attention(
    attn: Any, x: Tensor, rotary: tuple[Tensor, Tensor], visible: Tensor, tap: Tap
) -> Tensor:
    """Multi-head attention with grouped keys: project, norm, clip, rotate, attend."""
    config, d_head = attn.config, attn.head_dim
    q = tap("hook_q", attn.q_proj(x).unflatten(-1, (-1, d_head)))
    k = tap("hook_k", attn.k_proj(x).unflatten(-1, (-1, d_head)))
    v = attn.v_proj(x).unflatten(-1, (-1, d_head))

    if config.model_type == "olmoe":  # over the whole width, all heads together
        q = attn.q_norm(q.flatten(-2)).view_as(q)
        k = attn.k_norm(k.flatten(-2)).view_as(k)
    elif config.model_type == "qwen3_moe":  # within each head
        q, k = attn.q_norm(q), attn.k_norm(k)
    clip = getattr(config, "clip_qkv", None)
    if clip is not None:
        q, k, v = (part.clamp(-clip, clip) for part in (q, k, v))

    cos, sin = rotary
    v = tap("hook_v", v)
    q = tap("hook_rot_q", rotate_halves(q, cos, sin))
    k = tap("hook_rot_k", rotate_halves(k, cos, sin))
    return attend_and_write(attn, q, k, v, attn.scaling, visible, tap)


def latent_attention(attn: Any, x: Tensor, rotary: Tensor, visible: Tensor, tap: Tap) -> Tensor:
    """DeepSeek's attention: keys and values expanded from a latent, one rotary key shared by all heads."""
    nope, rope = attn.qk_nope_head_dim, attn.qk_rope_head_dim
    whole_rank = attn.q_lora_rank is None
    q = attn.q_proj(x) if whole_rank else attn.q_b_proj(attn.q_a_layernorm(attn.q_a_proj(x)))
    q = tap("hook_q", q.unflatten(-1, (attn.num_heads, nope + rope)))

    latent, shared_key = attn.kv_a_proj_with_mqa(x).split([attn.kv_lora_rank, rope], dim=-1)
    expanded = attn.kv_b_proj(attn.kv_a_layernorm(latent)).unflatten(
        -1, (attn.num_heads, nope + attn.v_head_dim)
    )
    k_nope, v = expanded.split([nope, attn.v_head_dim], dim=-1)
    shared_key = shared_key.unsqueeze(2).expand(-1, -1, attn.num_heads, -1)
    k = tap("hook_k", torch.cat([k_nope, shared_key], dim=-1))
    v = tap("hook_v", v)

    q = tap("hook_rot_q", torch.cat([q[..., :nope], rotate_pairs(q[..., nope:], rotary)], dim=-1))
    k = tap("hook_rot_k", torch.cat([k[..., :nope], rotate_pairs(k[..., nope:], rotary)], dim=-1))
    return attend_and_write(attn, q, k, v, attn.scaling, visible, tap)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `[b p h d_head]`, dimension i paired with i + d_head/2."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    turned_first = first * cos[..., :half] - second * sin[..., :half]
    turned_second = second * cos[..., half:] + first * sin[..., half:]
    return torch.cat([turned_first, turned_second], dim=-1)


def rotate_pairs(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding of `[b p h d_rope]`, dimension 2i paired with 2i+1; `turn` is complex."""
    turn = turn.unsqueeze(2)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned_even = even * turn.real - odd * turn.imag
    turned_odd = even * turn.imag + odd * turn.real
    return torch.stack([turned_even, turned_odd], dim=-1).flatten(-2)


def attend_and_write(
    attn: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float, visible: Tensor, tap: Tap
) -> Tensor:
    """Scores, pattern, mixed values and what each head writes, one head at a time."""
    n_heads = q.shape[2]
    group = n_heads // k.shape[2]  # so many query heads read one key head

    scores = []
    for head in range(n_heads):
        raw = q[:, :, head] @ k[:, :, head // group].transpose(1, 2) * scaling
        scores.append(raw.masked_fill(~visible, float("-inf")))
    pattern = tap("hook_attn_scores", torch.stack(scores, dim=1)).softmax(-1)
    pattern = tap("hook_pattern", pattern)

    z = tap(
        "hook_z", torch.stack([pattern[:, head] @ v[:, :, head // group] for head in range(n_heads)], dim=2)
    )
    results = []
    for head in range(n_heads):
        w_o = attn.o_proj.weight[:, head * z.shape[-1] : (head + 1) * z.shape[-1]]
        results.append(z[:, :, head] @ w_o.T)
    written = tap("hook_result", torch.stack(results, dim=2)).sum(2)
    return written if attn.o_proj.bias is None else written + attn.o_proj.bias


# --- feed-forward layers ------------------------------------------------------------------------------------


def attend_with_own(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    clean_keys: Tensor,
    clean_values: Tensor,
    rows: Sequence[int],
    scale: float,
) -> Tensor:
    """z of branches `[n branch head d]`, each of which sees its own key and the first `rows[n]` of `[key kv_head d]`.

    All scores are there at once in the tensors' dtype, the softmax is float32 at least, and its pattern is rounded to
    the tensors' dtype again.
    """
    group = queries.shape[2] // keys.shape[2]
    z = []
    for n, n_visible in enumerate(rows):
        for branch in range(queries.shape[1]):
            for head in range(queries.shape[2]):
                query, key_head = queries[n, branch, head], head // group
                earlier = clean_keys[:n_visible, key_head] @ query
                own = (keys[n, branch, key_head] * query).sum()
                scores = torch.cat((earlier, own[None])) * scale
                pattern = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
                pattern = pattern.to(values.dtype)
                read = pattern[:-1] @ clean_values[:n_visible, key_head]
                z.append(read + pattern[-1] * values[n, branch, key_head])
    return torch.stack(z).view(*queries.shape[:3], -1)


def dense_layer(mlp: Any, config: Any, x: Tensor, tap: Tap) -> Tensor:
    """A gated feed-forward layer without experts."""
    pre = tap("hook_pre", mlp.gate_proj(x))
    pre_linear = tap("hook_pre_linear", mlp.up_proj(x))
    return mlp.down_proj(tap("hook_post", mlp.act_fn(pre) * pre_linear))


def mixture_of_experts(mlp: Any, config: Any, x: Tensor, tap: Tap) -> Tensor:
    """Route every token, run its experts slot by slot, add the shared experts."""
    logits = tap("hook_router_logits", x.float() @ mlp.gate.weight.float().T)
    probabilities = tap("hook_expert_weights", logits.float().softmax(-1))
    indices = tap("hook_expert_indices", choose_experts(config, probabilities))
    weights = tap("hook_routing_weights", weights_of_chosen(config, probabilities, indices))

    experts = mlp.experts
    width = experts.down_proj.shape[-1]
    x_of_slot = x.unsqueeze(2).expand(-1, -1, indices.shape[-1], -1)
    pre = tap("hook_expert_pre", in_each_slot(experts.gate_up_proj[:, :width], indices, x_of_slot))
    pre_linear = tap(
        "hook_expert_pre_linear", in_each_slot(experts.gate_up_proj[:, width:], indices, x_of_slot)
    )
    post = tap("hook_expert_post", experts.act_fn(pre) * pre_linear)
    out = tap("hook_expert_out", in_each_slot(experts.down_proj, indices, post))
    contributions = tap("hook_expert_contrib", weights.unsqueeze(-1) * out)

    shared = shared_experts(mlp, x, tap)
    return contributions.sum(2) if shared is None else contributions.sum(2) + shared


def choose_experts(config: Any, probabilities: Tensor) -> Tensor:
    """`[b p k]`: the experts of highest probability, in order; group-limited top-k chooses groups first."""
    eligible = probabilities.clone()
    if getattr(config, "topk_method", "greedy") == "group_limited_greedy":
        size = probabilities.shape[-1] // config.n_group
        best_of_group = torch.stack([group.amax(-1) for group in probabilities.split(size, dim=-1)], dim=-1)
        chosen_groups = best_of_group.argsort(dim=-1, descending=True)[..., : config.topk_group]
        for expert in range(probabilities.shape[-1]):
            outside = (chosen_groups != expert // size).all(-1)
            eligible[..., expert] = eligible[..., expert].masked_fill(outside, float("-inf"))
    return eligible.argsort(dim=-1, descending=True)[..., : config.num_experts_per_tok]


def weights_of_chosen(config: Any, probabilities: Tensor, indices: Tensor) -> Tensor:
    """`[b p k]`: the probabilities of the chosen experts, renormalised or scaled as the family does."""
    weights = probabilities.gather(-1, indices)
    if config.model_type == "deepseek_v2":
        return weights * config.routed_scaling_factor
    if config.model_type == "mixtral" or config.norm_topk_prob:
        return weights / weights.sum(-1, keepdim=True)
    return weights


def in_each_slot(matrices: Tensor, indices: Tensor, inputs: Tensor) -> Tensor:
    """`out[b, p, k] = matrices[indices[b, p, k]] @ inputs[b, p, k]`, one slot after the other."""
    batch, length, slots = indices.shape
    rows = [
        matrices[indices[row, position, slot]] @ inputs[row, position, slot]
        for row in range(batch)
        for position in range(length)
        for slot in range(slots)
    ]
    return torch.stack(rows).view(batch, length, slots, -1)


def shared_experts(mlp: Any, x: Tensor, tap: Tap) -> Tensor | None:
    """What the experts that see every token add; one family weights it by a sigmoid gate of its own."""
    shared = getattr(mlp, "shared_expert", None) or getattr(mlp, "shared_experts", None)
    if shared is None:
        return None
    pre = tap("hook_shared_pre", shared.gate_proj(x))
    pre_linear = tap("hook_shared_pre_linear", shared.up_proj(x))
    out = shared.down_proj(tap("hook_shared_post", shared.act_fn(pre) * pre_linear))
    if hasattr(mlp, "shared_expert_gate"):
        out = tap("hook_shared_gate", mlp.shared_expert_gate(x).sigmoid()) * out
    return tap("hook_shared_out", out)
