"""Whether the slots of a layer sum to its output."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class SlotSumError(RuntimeError):
    """The slots of a layer do not sum to its output."""


@torch.no_grad()
def check_sum(products: Float[Tensor, "token k d"], layer_out: Float[Tensor, "token d"], name: str) -> None:
    """The slots' sum is the layer's output, to 1e-5 of the slots' own size at each token in float32, and to the
    roundings of a sum of as many terms in half precision, autocast's too.

    Args:
        products: each slot's output times its routing weight.
        name: of the layer, for the error.

    Raises:
        SlotSumError: it is not.
    """
    if layer_out.numel() == 0:
        return
    total = products.sum(dim=1)
    difference = (total.float() - layer_out.float()).abs()
    # A NaN that the layer gives by itself is the model's own.
    difference = difference.masked_fill(layer_out.isnan() & total.isnan(), 0.0)
    tiny = torch.finfo(torch.float32).tiny
    scale = products.float().abs().nan_to_num().sum(dim=1).amax(dim=-1).clamp_min(tiny)
    error = float((difference.amax(dim=-1) / scale).max())
    limit = max(1e-5, _coarsest(layer_out) * (2 + products.shape[1] / 2))
    if not error <= limit:
        raise SlotSumError(
            f"{name}: the slots' contributions do not sum to the layer's output: relative error {error:.1e}, over "
            f"{limit:.1e}"
        )


def _coarsest(value: Tensor) -> float:
    """The spacing of the coarsest numbers that a value may have gone through: its own, or those of autocast."""
    device, spacing = value.device.type, torch.finfo(value.dtype).eps
    if not torch.is_autocast_enabled(device):
        return spacing
    return max(spacing, torch.finfo(torch.get_autocast_dtype(device)).eps)
