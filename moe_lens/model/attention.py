"""Attention: grouped-query (with multi-head as its special case), and what every kind of attention shares.

Latent attention (`latent_attention.py`) makes its queries, keys and values in another way; from there on
everything is the same: scores, pattern, z, heads, output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from moe_lens.config import GroupedQueryAttentionConfig, LatentAttentionConfig, MoEConfig
from moe_lens.model.attend import Attend
from moe_lens.model.hook_point import HookPoint
from moe_lens.model.norm import rms_norm


class Attention(nn.Module):
    """From queries, keys and values to what is written into the residual stream; with all hook points."""

    def __init__(
        self,
        cfg: MoEConfig,
        attention: GroupedQueryAttentionConfig | LatentAttentionConfig,
        layer: int,
        output_bias: bool,
    ):
        super().__init__()
        self.layer = layer
        self.n_heads = attention.n_heads
        self.n_key_value_heads = attention.n_key_value_heads
        self.softmax_scale = attention.softmax_scale
        self.use_attn_result = cfg.use_attn_result
        self.o_proj = nn.Linear(attention.n_heads * attention.d_value, cfg.d_model, bias=output_bias)

        self.hook_q = HookPoint()
        self.hook_k = HookPoint()
        self.hook_v = HookPoint()
        self.hook_rot_q = HookPoint()
        self.hook_rot_k = HookPoint()
        self.hook_attn_scores = HookPoint(pos_dim=2)
        self.hook_pattern = HookPoint(pos_dim=2)
        self.hook_z = HookPoint()
        self.hook_result = HookPoint()

    @property
    def W_O(self) -> Float[Tensor, "head d_value d_model"]:
        return rearrange(
            self.o_proj.weight, "d_model (head d_value) -> head d_value d_model", head=self.n_heads
        )

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """The output bias; zeros where the checkpoint has none."""
        bias = self.o_proj.bias
        return torch.zeros_like(self.o_proj.weight[:, 0]) if bias is None else bias

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], attend: Attend
    ) -> Float[Tensor, "batch pos d_model"]:
        z = self.hook_z(attend.mix(self, *self.queries_keys_values(x, attend)))
        return self.project(z)

    def queries_keys_values(
        self, x: Float[Tensor, "batch pos d_model"], attend: Attend
    ) -> tuple[
        Float[Tensor, "batch pos head d_head"],
        Float[Tensor, "batch pos kv_head d_head"],
        Float[Tensor, "batch pos kv_head d_value"],
    ]:
        """Rotated queries and keys, and values. Each kind of attention has its own."""
        raise NotImplementedError

    def mix(
        self,
        queries: Float[Tensor, "batch query head d_head"],
        keys: Float[Tensor, "batch key kv_head d_head"],
        values: Float[Tensor, "batch key kv_head d_value"],
        attend: Attend,
    ) -> Float[Tensor, "batch query head d_value"]:
        """z: values averaged by the attention pattern. Scores and pattern are only made when listened to."""
        queries, keys, values = (rearrange(t, "b p h d -> b h p d") for t in (queries, keys, values))
        listened_to = self.hook_attn_scores.is_listened_to or self.hook_pattern.is_listened_to
        if listened_to or _fused_would_hide_nan(queries, keys):
            group = self.n_heads // self.n_key_value_heads
            keys, values = (repeat(t, "b h k d -> b (h group) k d", group=group) for t in (keys, values))
            visible = attend.visible(queries.shape[2], queries.device)
            # In place: the product is nobody else's, and large.
            scores = (queries @ keys.transpose(-1, -2)).mul_(self.softmax_scale)
            scores = self.hook_attn_scores(scores.masked_fill_(~visible, -torch.inf))
            pattern = self.hook_pattern(scores.float().softmax(dim=-1).to(values.dtype))
            z = pattern @ values
        else:
            z = F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=attend.mask,
                is_causal=attend.mask is None and queries.shape[2] > 1,
                scale=self.softmax_scale,
                enable_gqa=self.n_heads != self.n_key_value_heads,
            )
        return rearrange(z, "b h p d -> b p h d")

    def project(self, z: Float[Tensor, "batch pos head d_value"]) -> Float[Tensor, "batch pos d_model"]:
        """Every head's output, summed; apart for each head when `hook_result` is asked for."""
        if not (self.use_attn_result or self.hook_result.is_listened_to):
            return self.o_proj(rearrange(z, "b p h d -> b p (h d)"))
        result = einsum(z, self.W_O, "b p head d_value, head d_value d_model -> b p head d_model")
        out = self.hook_result(result).sum(dim=2)
        return out if self.o_proj.bias is None else out + self.o_proj.bias


def _fused_would_hide_nan(queries: Tensor, keys: Tensor) -> bool:
    """Whether a NaN or infinity would vanish: torch's fused kernel on the CPU gives z = 0 for it."""
    return queries.device.type == "cpu" and not bool(queries.isfinite().all() & keys.isfinite().all())


class GroupedQueryAttention(Attention):
    """Queries, keys and values by one linear map each; norms, clip and rotation where the family has them.

    `hook_q` and `hook_k` stand right after the projection, before norm, clip and rotation. `hook_v` is the
    value as it is attended to, after the clip, so that z is always pattern times `hook_v`.
    """

    def __init__(self, cfg: MoEConfig, attention: GroupedQueryAttentionConfig, layer: int):
        super().__init__(cfg, attention, layer, output_bias=attention.output_bias)
        self.attention = attention
        self.eps = cfg.eps
        d_queries = attention.n_heads * attention.d_head
        d_keys = attention.n_key_value_heads * attention.d_head
        self.q_proj = nn.Linear(cfg.d_model, d_queries, bias=attention.qkv_bias)
        self.k_proj = nn.Linear(cfg.d_model, d_keys, bias=attention.qkv_bias)
        self.v_proj = nn.Linear(cfg.d_model, d_keys, bias=attention.qkv_bias)
        if attention.query_key_norm != "none":
            per_head = attention.query_key_norm == "head"
            self.q_norm = nn.Parameter(torch.ones(attention.d_head if per_head else d_queries))
            self.k_norm = nn.Parameter(torch.ones(attention.d_head if per_head else d_keys))

    def queries_keys_values(self, x: Tensor, attend: Attend) -> tuple[Tensor, Tensor, Tensor]:
        d_head = self.attention.d_head
        queries, keys, values = (
            rearrange(proj(x), "b p (h d) -> b p h d", d=d_head)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        queries, keys = self.hook_q(queries), self.hook_k(keys)
        if self.attention.query_key_norm != "none":
            queries, keys = self._norm(queries, self.q_norm), self._norm(keys, self.k_norm)
        if (clip := self.attention.clip) is not None:
            queries, keys, values = (t.clamp(-clip, clip) for t in (queries, keys, values))
        values = self.hook_v(values)
        return self.hook_rot_q(attend.rotation(queries)), self.hook_rot_k(attend.rotation(keys)), values

    def _norm(self, x: Float[Tensor, "batch pos head d_head"], gain: Float[Tensor, " d"]) -> Tensor:
        if self.attention.query_key_norm == "head":
            return rms_norm(x, gain, self.eps)
        return rms_norm(x.flatten(-2), gain, self.eps).view_as(x)
