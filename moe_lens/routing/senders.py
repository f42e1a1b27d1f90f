"""Who writes into the residual stream before a router reads it, at each granularity.

A *granularity* (`by=`) says how finely the stream is divided. It is one function, from a model's config and
a receiving layer to the senders in the order in which they are added; `GRANULARITIES` holds them by name.
Whatever the granularity, the senders of a receiver sum to its `hook_resid_mid`, up to the rounding of the
stream itself. In half precision that rounding is large enough to be a sender of its own, `ROUNDING`.

`layer`, the coarsest, divides by what each layer adds:

    hook_resid_mid of r  =  embed  +  A0 + M0  +  A1 + M1  +  ...  +  A_r

An attention layer's output bias is inside `hook_attn_out`; shared experts are inside `hook_mlp_out`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moe_lens.config import MoEConfig

ROUNDING = "rounding"
"""The sender that is `hook_resid_mid` minus all others: what the stream lost at its additions."""


@dataclass(frozen=True)
class Sender:
    """One component that writes a vector `[batch, pos, d_model]` into the stream, seen at one hook point."""

    name: str
    hook: str


def layer_senders(cfg: MoEConfig, receiver: int) -> tuple[Sender, ...]:
    """`embed`, and every attention (`A`) and MoE or dense (`M`) layer before the MoE of layer `receiver`."""
    senders = [Sender("embed", "hook_embed")]
    for layer in range(receiver + 1):
        senders.append(Sender(f"A{layer}", f"blocks.{layer}.hook_attn_out"))
        if layer < receiver:
            senders.append(Sender(f"M{layer}", f"blocks.{layer}.hook_mlp_out"))
    return tuple(senders)


GRANULARITIES: dict[str, Callable[[MoEConfig, int], tuple[Sender, ...]]] = {"layer": layer_senders}


def senders_before(cfg: MoEConfig, receiver: int, by: str = "layer") -> tuple[Sender, ...]:
    """The senders whose sum the router of layer `receiver` reads, in the order in which they are added.

    Raises:
        ValueError: an unknown granularity; those there are, are listed.
    """
    if by not in GRANULARITIES:
        raise ValueError(f"by={by!r} is no granularity; available: {', '.join(map(repr, GRANULARITIES))}")
    return GRANULARITIES[by](cfg, receiver)


def stream_rounds(dtype: torch.dtype) -> bool:
    """Whether a stream of this dtype loses so much at its additions that rounding is a sender."""
    return dtype in (torch.bfloat16, torch.float16)


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of one addition, rounded to nearest."""
    return torch.finfo(dtype).eps / 2


class StreamSum:
    """The sum of the senders so far, in float32, and how far rounding can have moved the stream from it.

    An addition rounded to nearest errs by at most the unit roundoff times its result, coordinate by coordinate.
    So the stream's rounding is at most the unit roundoff times the sum of |partial sums| (to first order): a
    bound made of the senders alone, which a sender left out, or written twice, breaks.

    Args:
        first: what the stream begins with; it is no result of an addition.
        dtype: the stream's.
    """

    def __init__(self, first: Float[Tensor, "batch pos d_model"], dtype: torch.dtype):
        self.total = first.float()
        self.roundoff = unit_roundoff(dtype)
        self._partial_sums = torch.zeros_like(self.total)

    def add(self, vector: Float[Tensor, "batch pos d_model"]) -> None:
        """The next sender."""
        self.total = self.total + vector.float()
        self._partial_sums = self._partial_sums + self.total.abs()

    def rounding(self, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the stream holds beyond the senders' sum."""
        return stream.float() - self.total

    def rounding_ratio(
        self, stream: Float[Tensor, "batch pos d_model"], real: Bool[Tensor, "batch pos"] | None = None
    ) -> float:
        """max |rounding| / its bound over (real) tokens and coordinates: at most 1 where the senders are all there.

        The bound is doubled, for what is not of first order: partial sums are those of the exact stream, and
        rounding near a power of two, or below the smallest normal number, falls out of the simple picture.
        """
        tiny = torch.finfo(torch.float16).tiny
        bound = 2 * self.roundoff * (self._partial_sums + tiny)
        ratio = self.rounding(stream).abs() / bound
        return float((ratio if real is None else ratio[real]).max())
