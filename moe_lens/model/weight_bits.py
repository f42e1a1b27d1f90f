"""Two sums of a weight's bits, by which one weight is told from another."""

from __future__ import annotations

import torch
from torch import Tensor

# A prime, so that no block of a weight's rows is weighted alike.
_PERIOD = 8191
# So many periods stay in a core's cache, and their 16-bit numbers sum to one of 32 bits, which is several times faster.
_PERIODS_AT_ONCE = 64


def sums_of_bits(values: Tensor) -> tuple[int, int]:
    """The sum of a weight's bits as integers, and the sum weighted by place, counted from 1 and again after 8191.

    A number that is changed shows in both, and two that are exchanged in the second. Sums of integers wrap around, and
    so depend neither on their order nor on the device.
    """
    bits = values.detach().contiguous().flatten()
    bits = bits.view(torch.int16 if values.element_size() == 2 else torch.int32)
    partial = torch.int32 if bits.dtype == torch.int16 else torch.long
    by_place = torch.zeros(_PERIOD, dtype=torch.long, device=bits.device)
    whole = len(bits) // _PERIOD * _PERIOD
    for start in range(0, whole, _PERIODS_AT_ONCE * _PERIOD):
        periods = bits[start : min(whole, start + _PERIODS_AT_ONCE * _PERIOD)].view(-1, _PERIOD)
        by_place += periods.sum(dim=0, dtype=partial)
    by_place[: len(bits) - whole] += bits[whole:].long()
    places = torch.arange(1, _PERIOD + 1, device=bits.device)
    first, second = torch.stack((by_place.sum(), (by_place * places).sum())).tolist()
    return first, second
