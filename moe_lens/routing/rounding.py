"""What a half-precision stream loses at its additions, and how much that can be.

In half precision every addition into the stream rounds, and so does every sum inside a component (heads into an
attention layer, slots into an MoE layer). What the stream holds beyond the sum of its senders is a sender of its
own, `rounding`. It is never defined from the logits, and it is held against a bound made of the senders alone,
which a sender left out, or written twice, breaks: so the check can fail.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def stream_rounds(dtype: torch.dtype) -> bool:
    """Whether a stream of this dtype loses so much at its additions that rounding is a sender."""
    return dtype in (torch.bfloat16, torch.float16)


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of one addition, rounded to nearest."""
    return torch.finfo(dtype).eps / 2


def rounding_bound(
    sizes: Float[Tensor, "*place d_model"], roundoff: float
) -> Float[Tensor, "*place d_model"]:
    """The most that rounding can have moved a sum, coordinate by coordinate.

    The bound is doubled, for what is not of first order: partial sums are those of the exact stream, and rounding near
    a power of two, or below the smallest normal number, falls out of the simple picture.

    Args:
        sizes: the sum of the sizes that were rounded.
        roundoff: see `unit_roundoff`.
    """
    return 2 * roundoff * (sizes + torch.finfo(torch.float16).tiny)


class StreamSum:
    """The sum of the senders so far, in float32, and how far rounding can have moved the stream from it.

    An addition rounded to nearest errs by at most the unit roundoff times its result, coordinate by coordinate.
    So the stream's rounding is at most the unit roundoff times the sum of |partial sums| (to first order), and
    times what was rounded inside the components.

    Args:
        first: what the stream begins with; it is no result of an addition.
        dtype: the stream's.
    """

    def __init__(self, first: Float[Tensor, "batch pos d_model"], dtype: torch.dtype):
        self.total = first.float()
        self.roundoff = unit_roundoff(dtype)
        self._rounded = torch.zeros_like(self.total)

    def add(
        self,
        vector: Float[Tensor, "batch pos d_model"],
        rounded_inside: Float[Tensor, "batch pos d_model"] | None = None,
    ) -> None:
        """The next component's vector (the sum of its senders), and the sum of the sizes that were rounded while
        it was put together: none for a component that is taken whole."""
        self.total = self.total + vector.float()
        self._rounded = self._rounded + self.total.abs()
        if rounded_inside is not None:
            self._rounded = self._rounded + rounded_inside

    def rounding(self, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the stream holds beyond the senders' sum."""
        return stream.float() - self.total

    def rounding_ratio(
        self, stream: Float[Tensor, "batch pos d_model"], real: Bool[Tensor, "batch pos"] | None = None
    ) -> float:
        """max |rounding| / its bound over (real) tokens and coordinates: at most 1 where the senders are all there.

        See `rounding_bound`.
        """
        ratio = self.rounding(stream).abs() / rounding_bound(self._rounded, self.roundoff)
        return float((ratio if real is None else ratio[real]).max())
