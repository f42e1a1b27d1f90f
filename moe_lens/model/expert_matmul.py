"""One matmul per expert over the slots that chose it: one function, two back ends.

Slots are (token, choice) pairs. They are sorted by expert once, multiplied group by group, and put back
into their places afterwards; `SlotOrder` remembers where everything went.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

# Torch's dtypes for it since 2.9 (github.com/pytorch/pytorch/pull/162059).
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Backend = Literal["auto", "grouped", "loop"]


@dataclass(frozen=True)
class SlotOrder:
    """Slots sorted by the expert they chose.

    Attributes:
        order: for each sorted place, the flat slot `(batch pos k)` that lies there.
        inverse: for each flat slot, its sorted place.
        tokens: for each sorted place, the flat token `(batch pos)` of its slot.
        ends: for each expert, where its group ends (cumulative counts).
        shape: (batch, pos, k).
    """

    order: Int[Tensor, " slot"]
    inverse: Int[Tensor, " slot"]
    tokens: Int[Tensor, " slot"]
    ends: Int[Tensor, " expert"]
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, indices: Int[Tensor, "batch pos k"], n_experts: int) -> SlotOrder:
        batch, pos, k = indices.shape
        experts, order = indices.flatten().sort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        boundaries = torch.arange(1, n_experts + 1, device=order.device, dtype=experts.dtype)
        ends = torch.searchsorted(experts, boundaries, out_int32=True)
        return cls(order, inverse, order // k, ends, (batch, pos, k))

    def gather(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "slot d"]:
        """Each slot's token vector, in sorted order."""
        return x.flatten(0, 1)[self.tokens]

    def restore(self, sorted_slots: Float[Tensor, "slot d"]) -> Float[Tensor, "batch pos k d"]:
        """Sorted slots, back in their places."""
        batch, pos, k = self.shape
        return rearrange(sorted_slots[self.inverse], "(b p k) d -> b p k d", b=batch, p=pos, k=k)

    def sort(self, slots: Float[Tensor, "batch pos k d"]) -> Float[Tensor, "slot d"]:
        """The inverse of `restore`."""
        return rearrange(slots, "b p k d -> (b p k) d")[self.order]


def expert_matmul(
    x: Float[Tensor, "slot d_in"],
    weight: Float[Tensor, "expert d_in d_out"],
    ends: Int[Tensor, " expert"],
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "slot d_out"]:
    """`x[slot] @ weight[expert of slot]`, for slots sorted by expert.

    Args:
        x: slot vectors, sorted by expert.
        weight: the experts' matrices, stacked; views (a transpose, say) are welcome.
        ends: where each expert's group of slots ends; the last one equals the number of slots.
        backend: `grouped` is torch's grouped matmul; `loop` is a matmul per expert that has slots; `auto`
            takes the first where torch has it for these tensors, else the second.

    Raises:
        ValueError: an unknown backend, or `grouped` for tensors that torch's kernel does not take.
    """
    if backend not in ("auto", "grouped", "loop"):
        raise ValueError(f"backend must be 'auto', 'grouped' or 'loop', not {backend!r}")
    # The product's gradient is an operand of the backward pass, so its rows count as well.
    d_out_is_aligned = weight.shape[-1] * weight.element_size() % 16 == 0
    can_group = _kernel_takes(x) and _kernel_takes(weight) and d_out_is_aligned and x.shape[0] > 0
    if backend == "grouped" and not can_group:
        raise ValueError(
            f"torch's grouped matmul takes float32, bfloat16 or float16 on a CPU, or on a CUDA device of compute "
            f"capability 8.0 or above, in rows that are whole multiples of 16 bytes; not x {tuple(x.shape)} and weight "
            f"{tuple(weight.shape)} in {x.dtype} on {x.device}; use backend='loop'"
        )
    if backend == "loop" or not can_group:
        return _loop(x, weight, ends)
    out = F.grouped_mm(x, weight, offs=ends)
    if out.requires_grad:
        # Its backward pass refuses a gradient that was expanded from fewer numbers, as that of a sum is.
        out.register_hook(Tensor.contiguous)
    return out


def group_products(
    weights: Float[Tensor, "slot column"], x: Float[Tensor, "slot d"], ends: Int[Tensor, " group"]
) -> Float[Tensor, "group column d"]:
    """For each group of consecutive slots, the sum over its slots of `weights[slot]` times `x[slot]`.

    The same back ends as `expert_matmul`: torch's grouped matmul where it takes these tensors, else a loop.
    """
    # The kernel wants rows of whole multiples of 16 bytes: columns of zeros are added for it.
    padded = F.pad(weights, (0, -weights.shape[1] % (16 // weights.element_size()))).contiguous()
    if _kernel_takes(padded) and _kernel_takes(x) and x.shape[0] > 0:
        return F.grouped_mm(padded.T, x, offs=ends)[:, : weights.shape[1]]
    bounds = [0, *ends.tolist()]
    return torch.stack([weights[start:end].T @ x[start:end] for start, end in pairwise(bounds)])


def _kernel_takes(matrix: Tensor) -> bool:
    """Whether torch's grouped matmul accepts this operand: every stride but the unit one in 16-byte steps."""
    if not _has_kernel(matrix.device) or matrix.dtype not in _KERNEL_DTYPES or not hasattr(F, "grouped_mm"):
        return False
    (*_, rows, columns), strides = matrix.shape, list(matrix.stride())
    if strides[-1] == 1 and strides[-2] >= max(1, columns):
        strides.pop(-1)
    elif strides[-2] == 1 and strides[-1] >= max(1, rows):
        strides.pop(-2)
    else:
        return False
    size = matrix.element_size()
    return all(stride * size % 16 == 0 for stride in strides) and matrix.data_ptr() % 16 == 0


@cache
def _has_kernel(device: torch.device) -> bool:
    """On a CPU, and on CUDA devices of compute capability 8.0 and above (github.com/pytorch/pytorch/pull/161407).

    Below 9.0, and in other dtypes than bfloat16, torch's own kernel is a loop too; it takes as much care of itself.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu"


def _loop(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    bounds = [0, *ends.tolist()]
    groups = [
        x[start:end] @ weight[expert] for expert, (start, end) in enumerate(pairwise(bounds)) if end > start
    ]
    # Of no slots too, what comes out hangs on what went in, for a backward pass.
    return torch.cat(groups) if groups else x @ weight[0]
