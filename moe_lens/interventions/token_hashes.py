"""Hashes of tokens and their prefixes, in integers of 64 bits that wrap around: the same on every device.

What is drawn by a hash, rather than by a generator, depends on neither the order nor the batches in which it is asked.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

FOR_SAMPLE, FOR_DRAW = 1, 2
"""What a hash is for: two hashes of one token for unlike things have nothing to do with each other."""


def prefix_hashes(
    tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]
) -> Int[Tensor, "batch pos"]:
    """A hash of the real tokens up to and including each position: the same prefix has the same, whatever the padding.

    Wrap-around arithmetic of integers, so the same on every device. At padding it means nothing.

    Args:
        tokens: one document a row.
        real: where they are no padding; a row's real tokens stand in one run.

    Raises:
        ValueError: `real` has another shape than the tokens.
    """
    if tokens.ndim != 2 or real.shape != tokens.shape:
        raise ValueError(
            f"tokens {tuple(tokens.shape)} and real {tuple(real.shape)} must both be [batch, pos]"
        )
    real = real.to(tokens.device).bool()
    place = real.long().cumsum(dim=1)
    # A sum of hashes of (place, token): its order is in the places, and a sum needs no loop over positions.
    each = _mix(tokens.long() + (place << 32)).masked_fill(~real, 0)
    return _mix(each.cumsum(dim=1))


def _mix(values: Int[Tensor, "*place"]) -> Int[Tensor, "*place"]:
    """SplitMix64's output function (Steele, Lea and Flood, 2014), which is one to one, on 64-bit integers."""
    values = values + _signed(0x9E3779B97F4A7C15)
    values = (values ^ _shifted(values, 30)) * _signed(0xBF58476D1CE4E5B9)
    values = (values ^ _shifted(values, 27)) * _signed(0x94D049BB133111EB)
    return values ^ _shifted(values, 31)


def _shifted(values: Int[Tensor, "*place"], by: int) -> Int[Tensor, "*place"]:
    """To the right with zeros coming in, where torch's own shift repeats the sign."""
    return (values >> by) & (2 ** (64 - by) - 1)


def _signed(number: int) -> int:
    """The 64-bit two's complement of an integer."""
    return (number + 2**63) % 2**64 - 2**63


def hash_of(*parts: int | Int[Tensor, "*place"]) -> Int[Tensor, "*place"]:
    """63 bits that look random, 0 or positive, of some integers in their order; at least one is a tensor."""
    device = next(part.device for part in parts if isinstance(part, Tensor))
    state = torch.zeros((), dtype=torch.long, device=device)
    for part in parts:
        state = _mix(state ^ (_signed(part) if isinstance(part, int) else part))
    return _shifted(state, 1)
