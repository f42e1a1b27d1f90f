"""Rotary position embedding (Su et al., arXiv:2104.09864), in both pairings that checkpoints use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from moe_lens.config import RotaryConfig


@dataclass(frozen=True)
class Rotation:
    """The angles of one run's positions, as cosine and sine, in float32: `[batch, pos, pair]`.

    Positions are those of the queries and of the keys made from them; `batch` is 1 where all rows agree.
    """

    cos: Float[Tensor, "batch pos pair"]
    sin: Float[Tensor, "batch pos pair"]
    adjacent: bool

    def __call__(
        self, x: Float[Tensor, "batch pos head d_rotary"]
    ) -> Float[Tensor, "batch pos head d_rotary"]:
        """Turn each coordinate pair of `x` by its position's angle; float32 inside, `x`'s dtype outside."""
        cos, sin = self.cos[:, :, None, :], self.sin[:, :, None, :]
        if self.adjacent:
            first, second = rearrange(x.float(), "b p h (pair two) -> two b p h pair", two=2)
            turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
        else:
            first, second = x.float().chunk(2, dim=-1)
            turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return turned.to(x.dtype)


def rotation_at(cfg: RotaryConfig, positions: Int[Tensor, "batch pos"]) -> Rotation:
    """The rotation of the given positions (0 is the first)."""
    frequencies = torch.tensor(cfg.inverse_frequencies, dtype=torch.float32, device=positions.device)
    angles = positions[..., None].float() * frequencies
    return Rotation(
        cos=angles.cos() * cfg.attention_scaling,
        sin=angles.sin() * cfg.attention_scaling,
        adjacent=cfg.pairs == "adjacent",
    )
