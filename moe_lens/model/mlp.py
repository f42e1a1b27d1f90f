"""The gated MLP: act(x W_gate) * (x W_up), times W_down. Dense layers and shared experts are one of these."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from moe_lens.config import MoEConfig
from moe_lens.model.hook_point import HookPoint


class GatedMLP(nn.Module):
    """The weights and the arithmetic; its owner brings the hook points, because names differ."""

    def __init__(self, d_model: int, d_mlp: int, act_fn: str):
        super().__init__()
        # Gate and up lie in one tensor, so that one matmul makes both; W_gate and W_up are views of it.
        self.W_gate_up = nn.Parameter(torch.empty(2 * d_mlp, d_model))
        self.W_down = nn.Parameter(torch.empty(d_mlp, d_model))
        self.act_fn = ACT2FN[act_fn]

    @property
    def W_gate(self) -> Float[Tensor, "d_mlp d_model"]:
        return self.W_gate_up.chunk(2)[0]

    @property
    def W_up(self) -> Float[Tensor, "d_mlp d_model"]:
        return self.W_gate_up.chunk(2)[1]

    def project_in(
        self, x: Float[Tensor, "batch pos d_model"]
    ) -> tuple[Float[Tensor, "batch pos d_mlp"], Float[Tensor, "batch pos d_mlp"]]:
        """x W_gate and x W_up."""
        pre, pre_linear = F.linear(x, self.W_gate_up).chunk(2, dim=-1)
        return pre, pre_linear

    def run(
        self,
        x: Float[Tensor, "batch pos d_model"],
        hook_pre: HookPoint,
        hook_pre_linear: HookPoint,
        hook_post: HookPoint,
    ) -> Float[Tensor, "batch pos d_model"]:
        pre, pre_linear = self.project_in(x)
        post = hook_post(self.act_fn(hook_pre(pre)) * hook_pre_linear(pre_linear))
        return post @ self.W_down


class DenseMLP(GatedMLP):
    """The MLP of a layer without experts."""

    def __init__(self, cfg: MoEConfig):
        super().__init__(cfg.d_model, cfg.d_mlp, cfg.act_fn)
        self.hook_pre = HookPoint()
        self.hook_pre_linear = HookPoint()
        self.hook_post = HookPoint()

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """TransformerLens's name for `W_down`; its cache functions read it."""
        return self.W_down

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return self.run(x, self.hook_pre, self.hook_pre_linear, self.hook_post)
