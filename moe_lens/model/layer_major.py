"""Many batches through a streamed model, layer by layer: each layer is read once, whatever their number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from moe_lens.model.attend import Attend
from moe_lens.model.corpus_passes import Batch, CorpusBatch, MakeAttend
from moe_lens.model.freed_memory import FreedMemory
from moe_lens.model.loss import LOGITS_BUDGET, likelihood_in_parts, real_only
from moe_lens.model.observers import Run, apart
from moe_lens.model.residual_streams import ResidualStreams
from moe_lens.model.suspended import SuspendedRun

if TYPE_CHECKING:
    from moe_lens.model.streamed_moe import StreamedMoE

Listening = Callable[[int], AbstractContextManager[object]]
"""What listens to the i-th batch."""


@dataclass(frozen=True)
class CorpusRun:
    """What `run_corpus` gives.

    Attributes:
        losses: for each batch the next-token cross-entropy `[batch, pos - 1]` in nats, NaN at padding, on the CPU;
            None where none was asked for.
        bytes_read, layers_read: from the checkpoint.
        seconds_waiting: for a layer that was not there yet.
        layer_bytes: the most memory that layers took at a time, two of them at most.
        stream_bytes: memory that the residual streams took.
        spilled_bytes: of the file with those that were beyond the budget.
    """

    losses: list[Float[Tensor, "batch pos_minus_1"]] | None
    bytes_read: int
    layers_read: int
    seconds_waiting: float
    layer_bytes: int
    stream_bytes: int
    spilled_bytes: int


class _BatchRun:
    """One batch, somewhere on its way through the model."""

    def __init__(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch pos"] | None,
        layers: tuple[int, int],
        make_attend: MakeAttend | None,
    ):
        self.tokens, self.mask, self.make_attend = tokens, mask, make_attend
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        self.run = Run(real, *layers, tokens)

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens.shape[0], self.tokens.shape[1]

    def attend(self, model: StreamedMoE) -> Attend:
        """Made for each layer anew: a mask takes more memory than it takes time."""
        if self.make_attend is not None:
            return self.make_attend(model, self.run.real)
        return Attend(model.cfg.rotary, self.shape, model.cfg.device, attention_mask=self.mask)


@torch.no_grad()
def run_corpus(
    model: StreamedMoE,
    batches: Iterable[Batch],
    listening: Listening | None = None,
    *,
    return_type: Literal["loss"] | None = None,
    stop_at_layer: int | None = None,
    memory_budget: int = 2**30,
    logits_budget: int = LOGITS_BUDGET,
    spill_directory: str | Path | None = None,
    attend: MakeAttend | None = None,
    verbose: bool = False,
) -> CorpusRun:
    """Run batches through the model, reading each layer once for all of them.

    Each batch meets what it would meet in `model(tokens, attention_mask=mask)` under `torch.no_grad()`: the same
    values, bit by bit, at the same hook points in the same order. Only the batches are interleaved: all of them go
    through layer 0, then all through layer 1.

    `listening(i)` is entered before the i-th batch begins and left when it has ended, as it would be around a plain
    forward pass; the hooks and observers that it puts on the model are there only while that batch is at work. What
    listeners keep, they keep for all batches at once: those whose memory grows with what they have heard
    are to be given fewer batches at a time.

        with_accumulator = lambda i: accumulator.listening(*batches[i])
        model.run_corpus(batches, with_accumulator)

    Hooks, and an `intervene`, that are open around the call act on every batch.

    Args:
        batches: tokens `[batch, pos]`, or (tokens, mask), with whatever else, which is not read. Tokens are held in
            memory.
        listening: a context manager for the i-th batch.
        return_type: "loss", or None to run for the listeners alone.
        stop_at_layer: leave out this layer and those after it, and the final norm.
        memory_budget: bytes of residual streams that are held in memory; beyond it they lie in a mapped file.
        logits_budget: bytes of float32 logits that are made at a time. Where they are made in several parts, losses
            may differ from those of a plain run in the last digit.
        spill_directory: where that file is made, and removed at the end; None is the system's temporary directory.
        attend: makes another kind of attention than causal attention to real tokens, given the model and which tokens
            of a batch are real; it is made for each layer anew.
        verbose: say what will be read and held, and show a progress bar over layers times batches.

    Raises:
        ValueError: no batches; a batch that is no tokens, by its number; arguments that do not fit together.
        RuntimeError: a run is under way; an observer that can follow one run at a time only.
        OSError: no room for the file of streams.
        CheckpointChanged: a file is no longer what it was when the model was loaded.
        CheckpointMismatch: a tensor holds NaN or infinity.
        Whatever a listener raises; no other listener then hears its batch to the end.
    """
    if return_type not in ("loss", None):
        raise ValueError(f"return_type must be 'loss' or None, not {return_type!r}")
    if stop_at_layer is not None and return_type is not None:
        raise ValueError("with stop_at_layer there is no loss to return")
    first, last = model._layer_range(None, stop_at_layer)
    runs = _checked(model, batches, (first, last), attend)
    observers = list(model.run_observers)
    losses = []
    with (
        ResidualStreams(
            [run.shape for run in runs], model.cfg.d_model, model.cfg.dtype, memory_budget, spill_directory
        ) as streams,
        # Left last to first, as nested contexts are; and before the streams' file is removed.
        ExitStack() as all_contexts,
    ):
        if verbose:
            print(_plan(model, runs, range(first, last), streams))
        before = vars(model.read_counts).copy()
        suspended = [SuspendedRun(model) for _ in runs]
        for i, (batch, pause) in enumerate(zip(runs, suspended, strict=True)):
            all_contexts.push(pause.close)
            with pause.resumed() as contexts:
                model.run_observers[:] = [apart(observer) for observer in observers]
                if listening is not None:
                    contexts.enter_context(listening(i))
                contexts.enter_context(model.observed(batch.run))
                streams[i] = model.hook_embed(model.embed(batch.tokens))
        with (
            model.layers_in_memory(range(first, last)) as blocks,
            tqdm(total=(last - first) * len(runs), disable=not verbose, unit="batch") as progress,
        ):
            # Listeners make several values as large as a layer's own, in float32.
            freed, made = FreedMemory(), 1 if listening is None else 8
            for layer, block in enumerate(blocks, start=first):
                progress.set_description(f"layer {layer} of {first}..{last - 1}")
                for i, (batch, pause) in enumerate(zip(runs, suspended, strict=True)):
                    with pause.resumed():
                        stream = streams[i].to(model.cfg.device)
                        streams[i] = model.run_block(block, stream, batch.attend(model))
                    freed.add(made * activation_bytes(model, batch.tokens.numel()))
                    progress.update()
                freed.give_back()
        for i, (batch, pause) in enumerate(zip(runs, suspended, strict=True)):
            with pause.resumed():
                if stop_at_layer is None:
                    normalized = model.ln_final(streams[i].to(model.cfg.device))
                    if return_type == "loss":
                        losses.append(_loss(model, normalized, batch, logits_budget).cpu())
            streams.drop(i)
            pause.close()
    now = vars(model.read_counts)
    return CorpusRun(
        losses if return_type == "loss" else None,
        bytes_read=now["bytes_read"] - before["bytes_read"],
        layers_read=now["layers_read"] - before["layers_read"],
        seconds_waiting=now["seconds_waiting"] - before["seconds_waiting"],
        layer_bytes=now["peak_bytes"],
        stream_bytes=streams.bytes_in_memory,
        spilled_bytes=streams.bytes_in_file,
    )


def _checked(
    model: StreamedMoE, batches: Iterable[Batch], layers: tuple[int, int], attend: MakeAttend | None
) -> list[_BatchRun]:
    checked = (CorpusBatch.of(model, number, given) for number, given in enumerate(batches))
    runs = [_BatchRun(batch.tokens, batch.mask, layers, attend) for batch in checked]
    if not runs:
        raise ValueError("there are no batches to run")
    model.warn_beyond_context(max(run.shape[1] for run in runs))
    return runs


def _plan(model: StreamedMoE, runs: Sequence[_BatchRun], layers: range, streams: ResidualStreams) -> str:
    """What will be read and held."""
    store = model._required_store()
    n_bytes = store.stored_bytes(layers)
    n_tokens = sum(batch.tokens.numel() for batch in runs)
    in_file = f", and {streams.bytes_in_file / 2**20:,.1f} MiB in a file" if streams.bytes_in_file else ""
    return (
        f"plan: {len(layers)} layers, each read once: {n_bytes / 2**30:,.2f} GiB from disk "
        f"({model.reading_time(n_bytes)}), for {n_tokens:,} tokens in {len(runs)} batch(es)\n"
        f"memory: two layers {store.bytes_needed / 2**30:,.2f} GiB; residual streams "
        f"{streams.bytes_in_memory / 2**20:,.1f} MiB{in_file}"
    )


def activation_bytes(model: StreamedMoE, n_tokens: int) -> int:
    """What a layer makes of so many tokens: the largest of it by far are the slots' hidden values and outputs."""
    cfg = model.cfg
    per_token = cfg.top_k * (cfg.d_model + cfg.d_expert) if cfg.top_k else cfg.d_model
    return n_tokens * per_token * cfg.dtype.itemsize


def _loss(
    model: StreamedMoE, normalized: Float[Tensor, "batch pos d_model"], batch: _BatchRun, budget: int
) -> Float[Tensor, "batch pos_minus_1"]:
    nll = likelihood_in_parts(model.unembed, normalized, batch.tokens, budget)
    return real_only(nll, batch.mask)
