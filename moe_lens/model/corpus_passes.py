"""One pass of a corpus through a model, for those who listen: one way for models in memory and for those on disk.

    def listening(batch):
        return model.listening([(name, hook_for(batch.real)) for name in names])

    run_batches(model, batches, listening, stop_at_layer=4)

A model in memory takes the batches one after another. A streamed one reads each of its layers once for all of them
(`moe_lens.model.layer_major`). A listener hears the same values, and at every hook point the batches in the same order,
so what it sums by hook point is the same bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from moe_lens.model.attend import Attend
from moe_lens.model.observers import Run
from moe_lens.out_of_memory import said_what_would_help

if TYPE_CHECKING:
    from moe_lens.model.hooked_moe import HookedMoE

Batch = Int[Tensor, "batch pos"] | Sequence[Any]
"""Tokens, or a tuple of tokens, the mask of real ones (or None, where all are), and whatever else."""


@dataclass(frozen=True, eq=False)
class CorpusBatch:
    """One batch of a corpus, as a model takes it.

    Attributes:
        number: counted from 0.
        tokens: on the model's device.
        mask: true where they are real; None where all are.
        rest: what came with tokens and mask.
    """

    number: int
    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"] | None
    rest: tuple[Any, ...] = ()

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """Which tokens are real."""
        return torch.ones_like(self.tokens, dtype=torch.bool) if self.mask is None else self.mask

    @classmethod
    def of(cls, model: HookedMoE, number: int, given: Batch) -> CorpusBatch:
        """Raises:
        ValueError: it is no batch, or no tokens of the model; with its number.
        """
        if isinstance(given, str):
            raise ValueError(
                f"batch {number} must be tokens, not text; corpus.token_batches makes them of text"
            )
        parts = [given] if isinstance(given, Tensor) else given
        if not isinstance(parts, Sequence) or not parts:
            raise ValueError(
                f"batch {number} must be tokens, or a tuple that begins with them and their mask, not {given!r}"
            )
        if not isinstance(parts[0], Tensor):
            raise ValueError(f"batch {number} must begin with tokens, not {type(parts[0]).__name__}")
        if parts[0].ndim != 2:
            raise ValueError(
                f"batch {number}: tokens must be [batch, pos], one document a row, not {tuple(parts[0].shape)}"
            )
        try:
            tokens, mask = model.tokens_and_mask(parts[0], parts[1] if len(parts) > 1 else None)
        except ValueError as error:
            raise ValueError(f"batch {number}: {error}") from error
        return cls(number, tokens, mask, tuple(parts[2:]))


BatchListening = Callable[[CorpusBatch], AbstractContextManager[object]]
"""What listens to a batch while it runs."""
MakeAttend = Callable[["HookedMoE", Bool[Tensor, "batch pos"]], Attend]
"""What the queries of a batch may see, given which of its tokens are real."""


@torch.no_grad()
def run_batches(
    model: HookedMoE,
    batches: Iterable[Batch],
    listening: BatchListening | None = None,
    *,
    return_type: Literal["loss"] | None = None,
    stop_at_layer: int | None = None,
    attend: MakeAttend | None = None,
    n_batches: int | None = None,
    verbose: bool = False,
) -> list[Float[Tensor, "batch pos_minus_1"]] | None:
    """Run batches through the model without gradients; of a streamed model each layer is read once for all of them.

    `listening(batch)` is called, and what it gives entered, in the order of the batches, each before its batch begins,
    and left when its batch has ended. On a streamed model all of them are open together: a listener is to let go of a
    layer's values when it has used them, or its memory grows with the corpus. What it counts of the batches before
    this one must not wait for these to end.

    Args:
        batches: each tokens `[batch, pos]`, or a tuple of tokens, the mask of real ones (or None), and whatever else.
            A streamed model holds their tokens in memory.
        return_type: "loss", or None to run for the listeners alone.
        stop_at_layer: leave out this layer and those after it, and the final norm.
        attend: another kind of attention than causal attention to real tokens; only to run for listeners.
        n_batches: how many there are, where `len(batches)` does not tell; for the progress bar.
        verbose: show a progress bar: of batches, or on a streamed model of layers times batches, after a plan of what
            is read and what is held.

    Returns:
        With "loss", for each batch the next-token cross-entropy `[batch, pos - 1]` in nats, NaN at padding, on the CPU.

    Raises:
        ValueError: no batches; one that is none, by its number; arguments that do not fit together.
        RuntimeError: of a streamed model, as `run_corpus` says.
        NotEnoughMemory: memory ran out at a batch, which is named. What listeners heard of it cannot be taken back, so
            it is not tried again in parts.
    """
    # Not at the top, because the streamed model is made of this package's parts.
    from moe_lens.model.streamed_moe import StreamedMoE

    if return_type not in ("loss", None):
        raise ValueError(f"return_type must be 'loss' or None, not {return_type!r}")
    if attend is not None and return_type is not None:
        raise ValueError("with attend there is no loss to return")
    if isinstance(model, StreamedMoE):
        return _layer_by_layer(model, batches, listening, return_type, stop_at_layer, attend, verbose)
    losses = []
    n_batches = len(batches) if n_batches is None and isinstance(batches, Sized) else n_batches
    number = -1
    for number, given in enumerate(tqdm(batches, total=n_batches, disable=not verbose, unit="batch")):
        batch = CorpusBatch.of(model, number, given)
        with (
            nullcontext() if listening is None else listening(batch),
            said_what_would_help(
                f"batch {number}, of {len(batch.tokens)} documents", "a smaller batch_size, shorter documents"
            ),
        ):
            loss = _run(model, batch, return_type, stop_at_layer, attend)
        if return_type == "loss":
            losses.append(loss.cpu())
    if number < 0:
        raise ValueError("there were no batches to run")
    return losses if return_type == "loss" else None


def _layer_by_layer(
    model: Any,
    batches: Iterable[Batch],
    listening: BatchListening | None,
    return_type: Literal["loss"] | None,
    stop_at_layer: int | None,
    attend: MakeAttend | None,
    verbose: bool,
) -> list[Tensor] | None:
    checked = [CorpusBatch.of(model, number, given) for number, given in enumerate(batches)]
    if not checked:
        raise ValueError("there were no batches to run")
    what = f"{len(checked)} batches that go through the layers together"
    with said_what_would_help(what, "a smaller batch_size, shorter documents"):
        return model.run_corpus(
            [(batch.tokens, batch.mask) for batch in checked],
            None if listening is None else lambda number: listening(checked[number]),
            return_type=return_type,
            stop_at_layer=stop_at_layer,
            attend=attend,
            verbose=verbose,
        ).losses


def _run(
    model: HookedMoE,
    batch: CorpusBatch,
    return_type: Literal["loss"] | None,
    stop_at_layer: int | None,
    attend: MakeAttend | None,
) -> Any:
    if attend is None:
        return model(
            batch.tokens,
            attention_mask=batch.mask,
            return_type=return_type,
            loss_per_token=True,
            stop_at_layer=stop_at_layer,
        )
    first, last = model._layer_range(None, stop_at_layer)
    model.warn_beyond_context(batch.tokens.shape[1])
    with model.observed(Run(batch.real, first, last, batch.tokens)):
        residual = model.hook_embed(model.embed(batch.tokens))
        residual = model.run_blocks(residual, attend(model, batch.real), first, last)
        if stop_at_layer is None:
            model.ln_final(residual)
