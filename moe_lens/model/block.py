"""One layer: attention and MLP (experts or dense), each reading a normalised stream and adding to it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from moe_lens.config import GroupedQueryAttentionConfig, MoEConfig
from moe_lens.model.attend import Attend
from moe_lens.model.attention import GroupedQueryAttention
from moe_lens.model.hook_point import HookPoint
from moe_lens.model.latent_attention import LatentAttention
from moe_lens.model.mlp import DenseMLP
from moe_lens.model.moe import MoE
from moe_lens.model.norm import RMSNorm


class Block(nn.Module):
    # TransformerLens's logit lens asks whether hook_resid_post is the one stream that is unembedded. It is.
    hook_out_is_single_residual_stream = True

    def __init__(self, cfg: MoEConfig, layer: int):
        super().__init__()
        self.ln1 = RMSNorm(cfg.d_model, cfg.eps)
        if isinstance(cfg.attention, GroupedQueryAttentionConfig):
            self.attn = GroupedQueryAttention(cfg, cfg.attention, layer)
        else:
            self.attn = LatentAttention(cfg, cfg.attention, layer)
        self.ln2 = RMSNorm(cfg.d_model, cfg.eps)
        self.mlp = MoE(cfg) if layer in cfg.moe_layers else DenseMLP(cfg)

        self.hook_resid_pre = HookPoint(shares_memory=True)
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(
        self, resid_pre: Float[Tensor, "batch pos d_model"], attend: Attend
    ) -> Float[Tensor, "batch pos d_model"]:
        resid_pre = self.hook_resid_pre(resid_pre)
        attn_out = self.hook_attn_out(self.attn(self.ln1(resid_pre), attend))
        resid_mid = self.hook_resid_mid(resid_pre + attn_out)
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(resid_mid)))
        return self.hook_resid_post(resid_mid + mlp_out)
