"""What a result is of: which weights, which tokens, which edits; so that two runs under one name are told apart."""

from __future__ import annotations

import hashlib
import struct
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.routing.documents import real_tokens

_CHUNK = 2**24
# A prime, so that no block of a weight's rows is weighted alike.
_PERIOD = 8191
_KNOWN: WeakKeyDictionary[HookedMoE, tuple[tuple[int, ...], str]] = WeakKeyDictionary()


def weights_fingerprint(model: HookedMoE) -> str:
    """Of all bits of all parameters, in hex: the same on every device and for any number of threads.

    Two sums of every parameter's bits as integers, one of them weighted by place, so that any number that is changed,
    and any two that are exchanged, show. It is taken once for a model whose weights do not change.
    """
    versions = tuple(0 if p.is_inference() else p._version for p in model.parameters())
    known = _KNOWN.get(model)
    if known is not None and known[0] == versions:
        return known[1]
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(struct.pack("<2q", *_sums_of_bits(parameter.detach())))
    _KNOWN[model] = versions, digest.hexdigest()
    return digest.hexdigest()


def _sums_of_bits(values: Tensor) -> tuple[int, int]:
    bits = values.contiguous().flatten().view(torch.int16 if values.element_size() == 2 else torch.int32)
    total = torch.zeros(2, dtype=torch.long, device=bits.device)
    for start in range(0, len(bits), _CHUNK):
        # Sums of integers wrap around, and so do not depend on their order.
        chunk = bits[start : start + _CHUNK].long()
        places = torch.arange(start, start + len(chunk), device=bits.device) % _PERIOD + 1
        total += torch.stack((chunk.sum(), (chunk * places).sum()))
    first, second = total.tolist()
    return first, second


def edit_counts(model: HookedMoE) -> dict[str, int]:
    """How often each hook point has handed on another value than came; the difference of two says what was edited
    between them."""
    return {name: point.n_edits for name, point in model.hook_dict.items()}  # type: ignore[union-attr]


class TokenDigest:
    """Of documents' real tokens, in order, whatever the batches and the padding: as `TokenBatches.fingerprint`."""

    def __init__(self) -> None:
        self._digest: Any = hashlib.sha256()

    def add(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"] | None,
    ) -> None:
        real = real_tokens(tokens, mask).cpu()
        for row, kept in zip(tokens.cpu(), real, strict=True):
            ids = row[kept].tolist()
            self._digest.update(struct.pack(f"<{1 + len(ids)}q", len(ids), *ids))

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
