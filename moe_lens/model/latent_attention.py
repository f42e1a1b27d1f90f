"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, equations 9 to 19)."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from moe_lens.config import LatentAttentionConfig, MoEConfig
from moe_lens.model.attend import Attend
from moe_lens.model.attention import Attention
from moe_lens.model.norm import rms_norm


class LatentAttention(Attention):
    """Keys and values are read from a low-rank latent; a small rotary key is shared by all heads.

    `hook_q` and `hook_k` hold all of [nope | rope] per head, before rotation (the shared rotary key is
    repeated to every head, so that an edit may differ by head); `hook_v` has its own width.
    """

    def __init__(self, cfg: MoEConfig, attention: LatentAttentionConfig, layer: int):
        super().__init__(cfg, attention, layer, output_bias=attention.bias)
        self.attention = attention
        d_queries = attention.n_heads * attention.d_head
        if attention.query_rank is None:
            self.q_proj = nn.Linear(cfg.d_model, d_queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(cfg.d_model, attention.query_rank, bias=attention.bias)
            self.q_a_norm = nn.Parameter(torch.ones(attention.query_rank))
            self.q_b_proj = nn.Linear(attention.query_rank, d_queries, bias=False)
        self.kv_a_proj = nn.Linear(cfg.d_model, attention.kv_rank + attention.d_rope, bias=attention.bias)
        self.kv_a_norm = nn.Parameter(torch.ones(attention.kv_rank))
        self.kv_b_proj = nn.Linear(
            attention.kv_rank, attention.n_heads * (attention.d_nope + attention.d_value), bias=False
        )

    def queries_keys_values(self, x: Tensor, attend: Attend) -> tuple[Tensor, Tensor, Tensor]:
        cfg = self.attention
        if cfg.query_rank is None:
            queries = self.q_proj(x)
        else:
            queries = self.q_b_proj(rms_norm(self.q_a_proj(x), self.q_a_norm, cfg.latent_norm_eps))
        queries = self.hook_q(rearrange(queries, "b p (h d) -> b p h d", h=cfg.n_heads))

        latent, shared_rope = self.kv_a_proj(x).split((cfg.kv_rank, cfg.d_rope), dim=-1)
        keys_and_values = rearrange(
            self.kv_b_proj(rms_norm(latent, self.kv_a_norm, cfg.latent_norm_eps)),
            "b p (h d) -> b p h d",
            h=cfg.n_heads,
        )
        nope, values = keys_and_values.split((cfg.d_nope, cfg.d_value), dim=-1)
        rope = repeat(shared_rope, "b p d -> b p h d", h=cfg.n_heads)
        keys = self.hook_k(torch.cat((nope, rope), dim=-1))
        values = self.hook_v(values)
        return (
            self.hook_rot_q(self._rotate(queries, attend)),
            self.hook_rot_k(self._rotate(keys, attend)),
            values,
        )

    def _rotate(self, x: Tensor, attend: Attend) -> Tensor:
        nope, rope = x.split((self.attention.d_nope, self.attention.d_rope), dim=-1)
        return torch.cat((nope, attend.rotation(rope)), dim=-1)
