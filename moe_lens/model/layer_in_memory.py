"""One layer with its weights in memory, of any model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.streamed_moe import OnDisk, StreamedMoE


@contextmanager
def layer_in_memory(model: HookedMoE, layer: int) -> Iterator[Any]:
    """The block of a layer. Where the model is streamed and the layer is on disk, it is read, and let go at the end.

    Raises:
        RuntimeError: it must be read, and a run of this model is under way at another layer.
    """
    block = model.blocks[layer]
    if not isinstance(model, StreamedMoE) or not any(isinstance(p, OnDisk) for p in block.parameters()):
        yield block
        return
    with model.layers_in_memory([layer]) as blocks:
        yield from blocks
