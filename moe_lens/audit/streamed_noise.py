"""The noise floor of a census in half precision on a streamed model; see `moe_lens.audit.noise`.

Each of the three ways in which a sample of ablations is computed is one pass over the layers, for as many samples as
fit: replay, hooked full forward passes, and replay by a second streamed model, which reads the same checkpoint in
float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from moe_lens.audit.noise import Errors, NoiseFloor, Rows, drawn, errors
from moe_lens.interventions.branches import single_slots
from moe_lens.interventions.clean_run import CleanRun, MoEValues
from moe_lens.interventions.replay import Branches
from moe_lens.interventions.spec import Ablate
from moe_lens.interventions.streamed_replay import ToReplay, clean_bytes, replay_documents, together
from moe_lens.model.streamed_moe import OnDisk, StreamedMoE


def require_streamed_float32(model: StreamedMoE) -> None:
    """Raises:
    ValueError: the checkpoint's numbers are others than this model's, so that it cannot be read in float32.
    NotEnoughMemory: a second streamed model, in float32, does not fit beside this one.
    """
    from moe_lens.converters.checkpoint import Checkpoint
    from moe_lens.converters.errors import NotEnoughMemory
    from moe_lens.converters.loading import HUB_WEIGHTS, find_checkpoint, free_memory

    cfg = model.cfg
    stored = Checkpoint(find_checkpoint(cfg.model_name, cfg.revision, HUB_WEIGHTS)).dtype
    of_layers = sum(p.nbytes for p in model.parameters() if isinstance(p, OnDisk))
    if stored != cfg.dtype or model.stored_bytes(range(cfg.n_layers)) != of_layers:
        raise ValueError(
            f"the noise floor is measured against the same weights in float32, and {cfg.model_name} is not stored in "
            f"{cfg.dtype}, in which it is streamed: read in float32 it has others; noise_samples=0 leaves it out"
        )
    needed = float32_bytes(model)
    free = free_memory(cfg.device)
    if needed > free:
        raise NotEnoughMemory(
            f"the noise floor is measured against {model.cfg.model_name} streamed in float32 beside it, which takes "
            f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free; noise_samples=0 leaves it out"
        )


def stays_in_memory(model: StreamedMoE) -> int:
    """Bytes of what is not read with the layers: embeddings, routers, norms."""
    return sum(p.nbytes for p in model.parameters() if not isinstance(p, OnDisk))


def float32_bytes(model: StreamedMoE) -> int:
    """What the same model takes, streamed in float32."""
    return 4 // model.cfg.dtype.itemsize * (stays_in_memory(model) + model.layer_memory)


@torch.no_grad()
def streamed_noise_floor(
    model: StreamedMoE,
    documents: Rows,
    *,
    layers: Sequence[int],
    n_samples: int,
    seed: int,
    memory_budget: int,
    streams_budget: int,
    spill_directory: str | Path | None,
    verbose: bool = False,
) -> NoiseFloor:
    """As `noise_floor`, on the same sample: three passes over the layers, one of them in float32; more, where the
    clean runs of all samples' documents together do not fit the budget.

    Args:
        streams_budget, spill_directory: of the streams between layers.
        verbose: show a progress bar.

    Raises:
        ValueError: no documents.
        NotEnoughMemory: a second streamed model does not fit.
        CheckpointChanged: a file is no longer what it was when the model was loaded.
    """
    if not documents:
        raise ValueError("there are no documents to measure the noise floor on")
    require_streamed_float32(model)
    k = model.cfg.top_k
    samples = [
        (number, *sample)
        for number, of_document in drawn(documents, layers, k, n_samples, seed).items()
        for sample in of_document
    ]
    slots = single_slots(k, model.cfg.device)
    progress = tqdm(
        total=3 * len(samples), desc="noise floor", unit=" passes of a sample", disable=not verbose
    )

    def replayed(of: StreamedMoE, removed: Sequence[Tensor]) -> tuple[list[Any], list[list[int]]]:
        """Of each sample: its replay, and the experts that were chosen there."""
        chosen: list[list[int]] = [[] for _ in samples]
        asked = [
            ToReplay(
                *documents[number][0],
                [Branches(layer, branches)],
                torch.tensor([place]),
                memory_budget=memory_budget,
            )
            for (number, place, layer, _), branches in zip(samples, removed, strict=True)
        ]
        sizes = [clean_bytes(of, int(documents[number][0][1].sum())) for number, *_ in samples]
        results: list[Any] = []
        for group in together(sizes, streams_budget):

            def keep(i: int, clean: CleanRun, values: MoEValues, first: int = group.start) -> None:
                chosen[first + i] = values.indices[samples[first + i][1]].tolist()

            replays = replay_documents(
                of,
                asked[group.start : group.stop],
                streams_budget=streams_budget,
                spill_directory=spill_directory,
                on_layer=keep,
                advance=lambda i, share: progress.update(share),
            )
            # Not the clean runs: a group's are let go before the next begins.
            results += [result for _, result in replays]
            del replays
        return results, chosen

    half, chosen = replayed(model, [slots[[slot]] for *_, slot in samples])
    experts = [of_token[slot] for of_token, (*_, slot) in zip(chosen, samples, strict=True)]
    columns = [int(result.columns[0]) for result in half]
    receipts: dict[int, Any] = {}

    def hooked(i: int) -> AbstractContextManager[Any]:
        # The second half of the batches is as they are.
        if i >= len(samples):
            return nullcontext()
        spec = Ablate(f"M{samples[i][2]}E{experts[i]}", pos=columns[i], inactive="allow")
        return _keeping(receipts, i, model.intervene(spec))

    batches = [tuple(t[None] for t in documents[number][0]) for number, *_ in samples]
    losses = model.run_corpus(
        batches * 2,
        hooked,
        return_type="loss",
        memory_budget=streams_budget,
        spill_directory=spill_directory,
    ).losses
    assert losses is not None
    progress.update(len(samples))
    full, exactly_chosen = replayed(_in_float32(model), [slots] * len(samples))
    progress.close()
    found: list[Errors] = []
    n_routed_otherwise = 0
    for i, expert in enumerate(experts):
        # Routing may differ between the dtypes where experts are nearly tied: the expert is what is compared.
        if expert not in exactly_chosen[i] or receipts[i].fired == 0:
            n_routed_otherwise += 1
            continue
        its = exactly_chosen[i].index(expert)
        found.append(
            errors(
                truth=float(full[i].loss[0][0, its] - full[i].clean_loss[0]),
                changed=float(half[i].loss[0][0, 0]),
                null=float(half[i].null["loss"][0][0]),
                clean=float(half[i].clean_loss[0]),
                hooked_change=float(losses[i][0, columns[i]] - losses[i + len(samples)][0, columns[i]]),
            )
        )
    return NoiseFloor.of(found, n_routed_otherwise)


class _keeping(AbstractContextManager[None]):
    """A context, and in `kept[i]` what it gives."""

    def __init__(self, kept: dict[int, Any], i: int, context: AbstractContextManager[Any]):
        self.kept, self.i, self.context = kept, i, context

    def __enter__(self) -> None:
        self.kept[self.i] = self.context.__enter__()

    def __exit__(self, *exception: Any) -> bool | None:
        return self.context.__exit__(*exception)


def _in_float32(model: StreamedMoE) -> StreamedMoE:
    """The same weights, streamed in float32."""
    exact = type(model).from_pretrained(
        model.cfg.model_name,
        dtype=torch.float32,
        device=model.cfg.device,
        revision=model.cfg.revision,
        stream=True,
        verbose=False,
    )
    assert isinstance(exact, StreamedMoE)
    # What is in memory may be stored in more digits than this model has.
    for (_, its), (_, ours) in zip(exact.named_parameters(), model.named_parameters(), strict=True):
        if not isinstance(its, OnDisk):
            its.copy_(ours)
    return exact
