"""What a result is of: which weights, which tokens, which edits; so that two runs under one name are told apart."""

from __future__ import annotations

import hashlib
import struct
from typing import Any
from weakref import WeakKeyDictionary

from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.streamed_moe import OnDisk, StreamedMoE
from moe_lens.model.weight_bits import sums_of_bits
from moe_lens.routing.documents import real_tokens

_KNOWN: WeakKeyDictionary[HookedMoE, tuple[tuple[int, ...], str]] = WeakKeyDictionary()


def weights_fingerprint(model: HookedMoE) -> str:
    """Of all bits of all parameters, in hex: the same on every device, for any number of threads, and whether the
    layers are in memory or streamed from disk.

    It is made of two sums of every parameter's bits (`sums_of_bits`), and is taken once for a model whose weights do
    not change. A streamed model takes the sums of a layer when it first reads it; those that it has not read are read
    for this.
    """
    versions = tuple(
        0 if isinstance(p, OnDisk) or p.is_inference() else p._version for p in model.parameters()
    )
    known = _KNOWN.get(model)
    if known is not None and known[0] == versions:
        return known[1]
    of_layers = model.layer_sums_of_bits() if isinstance(model, StreamedMoE) else {}
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sums = of_layers[name] if isinstance(parameter, OnDisk) else sums_of_bits(parameter)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(struct.pack("<2q", *sums))
    _KNOWN[model] = versions, digest.hexdigest()
    return digest.hexdigest()


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
