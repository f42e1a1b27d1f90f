"""RMSNorm, split where a researcher cuts it: the scale, the normalised stream, the gain."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe_lens.model.hook_point import HookPoint


def rms_scale(x: Float[Tensor, "*batch d"], eps: float) -> Float[Tensor, "*batch 1"]:
    """sqrt(mean(x^2) + eps) over the last axis, in float32 whatever x's dtype."""
    return (x.float().pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()


def rms_norm(
    x: Float[Tensor, "*batch d"], gain: Float[Tensor, " d"], eps: float
) -> Float[Tensor, "*batch d"]:
    """RMSNorm without hook points, for the norms inside attention; returns x's dtype."""
    return gain * (x.float() / rms_scale(x, eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """gain * x / sqrt(mean(x^2) + eps), with `hook_scale` on the denominator and `hook_normalized` before
    the gain. Scale and division are in float32; the normalised stream is in x's dtype."""

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.w = nn.Parameter(torch.ones(d_model))
        self.eps = eps
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        scale = self.hook_scale(rms_scale(x, self.eps))
        normalized = self.hook_normalized((x.float() / scale).to(x.dtype))
        return self.w * normalized
