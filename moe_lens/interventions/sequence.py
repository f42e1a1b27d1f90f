"""Replays that run whole suffixes of a document: an expert changed at every position, or later losses read.

`sequence` scope: the expert is changed wherever it is active in the document, and the loss is read at each position.
All positions are read from one pass through the later layers per (document, layer, expert): routing at the changed
layer itself stays clean, because its input does. Experts go together as a batch, `[expert, pos, d]`.

Later losses: the expert is changed at one token, and the losses of the tokens after it are read. That takes a pass of
its own for every (document, layer, expert, position), from that position on, over the clean keys and values before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moe_lens.interventions.branches import Change, starts
from moe_lens.interventions.clean_run import CleanRun, MoEValues
from moe_lens.interventions.expert_outputs import SHARED
from moe_lens.interventions.outcomes import Outcome, read_outcomes
from moe_lens.interventions.replay_plan import HELP, branch_bytes
from moe_lens.model.attend import Attend, KeyValueCache
from moe_lens.out_of_memory import InParts


@torch.no_grad()
def everywhere(
    clean: CleanRun,
    values: MoEValues,
    experts: Int[Tensor, " expert"],
    rows: Int[Tensor, " n"],
    change: Change,
    outcomes: Sequence[Outcome] = (),
    memory_budget: int = 2**30,
) -> tuple[dict[str, Float[Tensor, "n expert"]], Float[Tensor, "n expert"]]:
    """Each expert changed at every position of the document where it is active, one pass for each.

    Args:
        clean, values: the document, and the layer.
        experts: which, -1 for the shared experts; each in a pass of its own.
        rows: where outcomes are read, as places among the document's tokens that have a next one.
        change: how the experts are changed.
        outcomes: what is read beside the loss.
        memory_budget: bytes that the passes may take at once.

    Returns:
        Outcomes by name (`"loss"` in nats), and the gap norm at each position itself, of every expert.

    Raises:
        FloatingPointError: an outcome is NaN or infinite; its place is named.
    """
    n_tokens = len(clean.tokens)
    at_once = max(1, memory_budget // (branch_bytes(clean.model, 0) * n_tokens))
    parts = InParts("experts' passes over a document", HELP, at_once).run(
        lambda part: _everywhere(clean, values, experts[part], rows, change, outcomes, memory_budget),
        len(experts),
    )
    read = {name: torch.cat([part[0][name] for part in parts], dim=1) for name in parts[0][0]}
    for name, value in read.items():
        broken = (~value.isfinite()).nonzero()
        if len(broken):
            row, expert = broken[0].tolist()
            number = int(experts[expert])
            changed = f"M{values.layer}S" if number == SHARED else f"M{values.layer}E{number}"
            raise FloatingPointError(
                f"{name} is {float(value[row, expert])} at position {int(clean.columns[rows[row]])} after the change "
                f"of {changed} at every position"
            )
    return read, torch.cat([part[1] for part in parts], dim=1)


def _everywhere(
    clean: CleanRun,
    values: MoEValues,
    experts: Int[Tensor, " expert"],
    rows: Int[Tensor, " n"],
    change: Change,
    outcomes: Sequence[Outcome],
    memory_budget: int,
) -> tuple[dict[str, Float[Tensor, "n expert"]], Float[Tensor, "n expert"]]:
    every = torch.arange(len(clean.tokens), device=rows.device)
    is_expert = rearrange(values.indices, "pos k -> pos 1 k") == rearrange(experts, "expert -> 1 expert 1")
    shared = experts == SHARED
    start = starts(clean, values, every, is_expert, change, shared if bool(shared.any()) else None)
    streams = rearrange(start.streams, "pos expert d -> expert pos d")
    attend = Attend(
        clean.model.cfg.rotary,
        (len(experts), len(every)),
        rows.device,
        positions=clean.columns[None],
    )
    final = clean.model.run_blocks(streams, attend, values.layer + 1)
    read = read_outcomes(
        clean, rows, rearrange(final[:, rows], "expert n d -> n expert d"), outcomes, memory_budget
    )
    return read, start.gap_norm[rows]


@torch.no_grad()
def later_losses(
    clean: CleanRun,
    values: MoEValues,
    row: int,
    removed: Bool[Tensor, "branch k"],
    change: Change,
    shared_removed: Bool[Tensor, " branch"] | None = None,
    memory_budget: int = 2**30,
) -> Float[Tensor, " branch"]:
    """The mean change of the losses after a token, when slots are changed at that token alone.

    Args:
        clean, values: the document, and the layer.
        row: the token, as its place among the document's.
        removed, shared_removed, change: as in `replay`.
        memory_budget: bytes that the branches may take at once.

    Returns:
        Nats; the mean over the later positions that have a next token, NaN where there are none.

    Raises:
        FloatingPointError: a later loss is NaN or infinite; its place is named.
    """
    model, n_tokens = clean.model, len(clean.tokens)
    later = clean.has_next.clone()
    later[: row + 1] = False
    if not bool(later.any()):
        return torch.full((len(removed),), torch.nan, device=removed.device)
    # Every branch keeps its keys and values of all tokens, at all later layers.
    kept = sum(
        of[layer].nbytes for of in (clean.keys, clean.values) for layer in _later_layers(clean, values)
    )
    at_once = max(1, memory_budget // (branch_bytes(model, n_tokens) * (n_tokens - row) + kept))
    suffix = torch.arange(row, n_tokens, device=removed.device)
    nothing = torch.zeros(len(suffix), 1, removed.shape[1], dtype=torch.bool, device=removed.device)
    unchanged = starts(clean, values, suffix, nothing, Change()).streams[:, 0]

    def of_branches(some: slice) -> Float[Tensor, " branch"]:
        part, part_shared = removed[some], None if shared_removed is None else shared_removed[some]
        start = starts(clean, values, suffix[:1], part[None], change, part_shared).streams[0]
        streams = repeat(unchanged, "pos d -> branch pos d", branch=len(part)).clone()
        streams[:, 0] = start
        attend = Attend(
            model.cfg.rotary,
            (len(part), len(suffix)),
            removed.device,
            positions=clean.columns[None, row:],
            past=_clean_past(clean, row, len(part), _later_layers(clean, values)),
        )
        final = model.run_blocks(streams, attend, values.layer + 1)
        places = later.nonzero()[:, 0]
        losses = read_outcomes(
            clean,
            places,
            rearrange(final[:, places - row], "branch n d -> n branch d"),
            (),
            memory_budget,
        )["loss"]
        broken = (~losses.isfinite()).nonzero()
        if len(broken):
            place, branch = broken[0].tolist()
            raise FloatingPointError(
                f"the loss at position {int(clean.columns[places[place]])} is {float(losses[place, branch])} after the "
                f"change at layer {values.layer}, position {int(clean.columns[row])}"
            )
        return (losses - clean.loss[places][:, None]).mean(dim=0)

    return torch.cat(InParts("branches' later losses", HELP, at_once).run(of_branches, len(removed)))


def _later_layers(clean: CleanRun, values: MoEValues) -> range:
    return range(values.layer + 1, clean.model.cfg.n_layers)


def _clean_past(clean: CleanRun, row: int, n_branches: int, layers: range) -> KeyValueCache | None:
    """The clean keys and values of the tokens before a row, for every branch."""
    if row == 0:
        return None
    past = KeyValueCache()
    for layer in layers:
        past.layers[layer] = (
            repeat(clean.keys[layer][:row], "key kv d -> branch key kv d", branch=n_branches),
            repeat(clean.values[layer][:row], "key kv d -> branch key kv d", branch=n_branches),
        )
    past.key_is_real = torch.ones(n_branches, row, dtype=torch.bool, device=clean.tokens.device)
    return past
