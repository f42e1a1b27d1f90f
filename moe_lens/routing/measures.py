"""What is measured of one sender's scores over the experts of a router, at one token.

With S_e what a sender adds to the logit of expert e, over N experts:

    variance = mean_e (S_e - mean_e S)^2      logits^2; how unequally the sender treats the experts
    aps      = mean_e max(S_e, 0)             logits; the average positive score: promotion
    ans      = mean_e min(S_e, 0)             logits; the average negative score: inhibition
    mean     = mean_e S_e                     logits; aps + ans: a shift that all experts share, which routes nothing
    norm     = || gamma_r z / s_r ||_2        the length of what the router reads of the sender; no unit

Every measure is homogeneous in 1/s_r, the receiver's scale: variance of degree 2, the others of degree 1. So they
may be taken before the scale is known.

Source: "Understanding Cross-Layer Contributions to Mixture-of-Experts Routing in LLMs" (ICLR 2026), section 5.1,
eq. 12, and appendix K for the norm.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from moe_lens.model.attention import Attention

MEASURES = ("variance", "aps", "ans", "mean", "norm")
RANK_MEASURES = ("aarv", "overlap", "weight_change")
UNITS = {
    "variance": "logits²",
    "aps": "logits",
    "ans": "logits",
    "mean": "logits",
    "norm": "",
    "aarv": "ranks",
    "overlap": "share of the top-K",
    "weight_change": "routing weight",
}
SCALE_POWERS = (2, 1, 1, 1, 1)
"""With which power of 1/s_r each of `MEASURES` goes."""


def chunk_size(device: torch.device) -> int:
    """How many scores are made at once: on a CPU about what a core's cache holds, so that the passes over them do not
    wait for memory; on a GPU enough to keep it busy."""
    return 2**20 if device.type == "cpu" else 2**26


def score_measures(
    scores: Float[Tensor, "*place receiver expert"], norms: Float[Tensor, "*place receiver"]
) -> Float[Tensor, "*place measure receiver"]:
    """All of `MEASURES`, in that order, over the last axis."""
    mean = scores.mean(dim=-1)
    # Centred first: a shift that all experts share may be far larger than the spread.
    variance = (scores - mean[..., None]).square_().mean(dim=-1)
    aps, ans = scores.clamp(min=0).mean(dim=-1), scores.clamp(max=0).mean(dim=-1)
    return torch.stack((variance, aps, ans, mean, norms), dim=-2)


def normalised_lengths(
    vectors: Float[Tensor, "*place d_model"], gains: Float[Tensor, "receiver d_model"]
) -> Float[Tensor, "*place receiver"]:
    """|| gamma_r z ||_2 for every receiver, not yet divided by its scale."""
    return (vectors.square() @ gains.square().T).sqrt_()


def head_lengths(
    attention: Attention, z: Float[Tensor, "token head d_value"], gains: Float[Tensor, "receiver d_model"]
) -> Float[Tensor, "token head receiver"]:
    """The same for z_h W_O^h, a head at a time: all heads' vectors at once would be many times the stream."""
    weight, squared_gains = attention.W_O.detach().float(), gains.square().T
    lengths = []
    for head in range(z.shape[1]):
        written = z[:, head] @ weight[head]
        lengths.append((written.square_() @ squared_gains).sqrt_())
    return rearrange(lengths, "head token receiver -> token head receiver")
