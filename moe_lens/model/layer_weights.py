"""Weights of a layer that somebody reads outside of its run: where they are, or from disk for this."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moe_lens.model.hooked_moe import HookedMoE
from moe_lens.model.streamed_moe import OnDisk, StreamedMoE


@contextmanager
def weights_in_memory(model: HookedMoE, layer: int | None) -> Iterator[None]:
    """Within this a layer's weights can be read. A streamed model reads them from disk, unless the layer is at work;
    what is kept of them beyond this must be a copy.

    Args:
        layer: None is none.

    Raises:
        RuntimeError: another layer of a streamed model is at work, so that there is no memory for this one.
        CheckpointChanged, CheckpointMismatch: as `StreamedMoE.layers_in_memory`.
    """
    if layer is None or not any(isinstance(p, OnDisk) for p in model.blocks[layer].parameters()):
        yield
        return
    with model.layers_in_memory([layer]) as blocks:
        next(blocks)
        yield


def require_all_layers(model: HookedMoE, what: str) -> None:
    """Refuse a streamed model before anything runs.

    Args:
        what: needs more than one layer at a time.

    Raises:
        ValueError: the model is a streamed one.
    """
    if isinstance(model, StreamedMoE):
        raise ValueError(
            f"{what} needs the weights of several layers at a time, and a streamed model holds only the layer that "
            f"runs; load the model without stream=True"
        )


def require_gradients_of(model: HookedMoE, what: str) -> None:
    """Refuse a streamed model before anything runs.

    Args:
        what: needs gradients.

    Raises:
        ValueError: the model is a streamed one.
    """
    if isinstance(model, StreamedMoE):
        raise ValueError(
            f"{what} needs gradients, and a streamed model has none: going back needs layers that are no longer in "
            f"memory; load the model without stream=True"
        )
