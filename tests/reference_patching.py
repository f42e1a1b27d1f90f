"""Slow, obvious implementations of activation and attribution patching, by edits of `tests.reference.reference_run`.

A patch is written into the corrupted run number by number: row, position, head, slot. Nothing of moe_lens is imported.

    clean = reference_cache(hf_model, clean_tokens, mask)
    logits = patched_logits(hf_model, corrupted, mask, clean, "attn.hook_z", {"layer": 1, "head": 2})
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tests.reference import Cache, Edits, reference_cache, reference_logits, reference_run

AXES = {
    "batch pos d_model": "hook_embed hook_resid_pre hook_resid_mid hook_resid_post hook_attn_out hook_mlp_out "
    "mlp.hook_shared_out ln1.hook_normalized ln2.hook_normalized ln_final.hook_normalized",
    "batch pos one": "ln1.hook_scale ln2.hook_scale ln_final.hook_scale mlp.hook_shared_gate",
    "batch pos head d_head": "attn.hook_q attn.hook_k attn.hook_v attn.hook_rot_q attn.hook_rot_k attn.hook_z",
    "batch pos head d_model": "attn.hook_result",
    "batch head pos key": "attn.hook_attn_scores attn.hook_pattern",
    "batch pos expert": "mlp.hook_router_logits mlp.hook_expert_weights",
    "batch pos slot": "mlp.hook_expert_indices mlp.hook_routing_weights",
    "batch pos slot neuron": "mlp.hook_expert_pre mlp.hook_expert_pre_linear mlp.hook_expert_post",
    "batch pos slot d_model": "mlp.hook_expert_out mlp.hook_expert_contrib",
    "batch pos neuron": "mlp.hook_shared_pre mlp.hook_shared_pre_linear mlp.hook_shared_post mlp.hook_pre "
    "mlp.hook_pre_linear mlp.hook_post",
}
Cell = Mapping[str, int]


def kind_of(name: str) -> str:
    """A hook point's name within its block, or a global point's whole name."""
    return re.sub(r"^blocks\.\d+\.", "", name)


def axes_of(activation: str) -> list[str]:
    return next(axes.split() for axes, names in AXES.items() if activation in names.split())


def names_of(clean: Cache, activation: str, cell: Cell) -> list[str]:
    """The hook points that are patched: of the cell's layer, or of all."""
    return [
        name
        for name in clean
        if kind_of(name) == activation
        and ("layer" not in cell or name.startswith(f"blocks.{cell['layer']}."))
    ]


def patched_logits(
    hf_model: Any, corrupted: Tensor, mask: Tensor, clean: Cache, activation: str, cell: Cell
) -> Tensor:
    """Logits of the corrupted run with one cell of an activation as it was in the clean run."""
    if activation == "mlp.hook_expert_contrib" and "expert" in cell:
        edits = expert_edits(mask, clean, names_of(clean, activation, cell), cell)
    else:
        edits = {
            name: lambda value, name=name: replaced(value, clean[name], mask, axes_of(activation), cell)
            for name in names_of(clean, activation, cell)
        }
    return reference_logits(hf_model, corrupted, mask, edits)


def replaced(value: Tensor, clean: Tensor, mask: Tensor, axes: list[str], cell: Cell) -> Tensor:
    """Every number of the cell, at real tokens, replaced by the clean one; the last axis in one go if it is free."""
    looped = axes if axes[-1] in cell else axes[:-1]
    for place in product(*(range(value.shape[axes.index(axis)]) for axis in looped)):
        at = dict(zip(looped, place, strict=True))
        if mask[at["batch"], at["pos"]] and all(
            at.get(axis) == i for axis, i in cell.items() if axis != "layer"
        ):
            value[place] = clean[place]
    return value


def contribution(values: Cache, at: str, row: int, position: int, expert: int) -> Tensor:
    """What an expert of a layer added at a token: its slot's, or nothing."""
    contributions = values[at + "mlp.hook_expert_contrib"][row, position]
    for slot, chosen in enumerate(values[at + "mlp.hook_expert_indices"][row, position].tolist()):
        if chosen == expert:
            return contributions[slot]
    return torch.zeros_like(contributions[0])


def expert_edits(mask: Tensor, clean: Cache, names: list[str], cell: Cell) -> Edits:
    """One expert's contribution exchanged, in what its layer writes."""
    edits: dict[str, Callable[[Tensor], Tensor]] = {}
    own: Cache = {}

    def keep(value: Tensor, name: str) -> Tensor:
        own[name] = value
        return value

    def exchange(value: Tensor, at: str) -> Tensor:
        for row, position in mask.nonzero().tolist():
            if cell.get("pos", position) == position and cell.get("batch", row) == row:
                expert = cell["expert"]
                value[row, position] += contribution(clean, at, row, position, expert)
                value[row, position] -= contribution(own, at, row, position, expert)
        return value

    for name in names:
        at = name.removesuffix("mlp.hook_expert_contrib")
        for point in ("mlp.hook_expert_contrib", "mlp.hook_expert_indices"):
            edits[at + point] = lambda value, name=at + point: keep(value, name)
        edits[at + "hook_mlp_out"] = lambda value, at=at: exchange(value, at)
    return edits


# --- attribution patching -----------------------------------------------------------------------------------


def reference_attributions(
    hf_model: Any, patched: Tensor, other: Tensor, mask: Tensor, metric: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """`[pos]` for every head, routed expert and shared expert: gradient in the patched run times the difference."""
    source = reference_cache(hf_model, other, mask)
    zeros: Cache = {}

    def plus_zero(value: Tensor, name: str) -> Tensor:
        zeros[name] = torch.zeros_like(value, requires_grad=True)
        return value + zeros[name]

    names = [name for name in source if kind_of(name) in ("attn.hook_z", "hook_mlp_out")]
    edits = {name: lambda value, name=name: plus_zero(value, name) for name in names}
    logits, base = reference_run(hf_model, patched, mask, edits)
    found = torch.autograd.grad(metric(logits), [zeros[name] for name in names], allow_unused=True)
    gradients = dict(zip(names, found, strict=True))

    n_layers = len(hf_model.model.layers)
    out: dict[str, Tensor] = {}
    for layer, (row, position) in product(range(n_layers), mask.nonzero().tolist()):
        at = f"blocks.{layer}."

        def add(name: str, change: Tensor, gradient: Tensor, position: int = position) -> None:
            of_sender = out.setdefault(name, torch.zeros(mask.shape[1]))
            of_sender[position] += (change * gradient).sum().detach()

        z = at + "attn.hook_z"
        for head in range(base[z].shape[2]):
            change = source[z][row, position, head] - base[z][row, position, head]
            add(f"A{layer}H{head}", change, gradients[z][row, position, head])
        if at + "mlp.hook_expert_contrib" not in base:
            continue
        gradient = gradients[at + "hook_mlp_out"][row, position]
        for expert in range(base[at + "mlp.hook_expert_weights"].shape[2]):
            change = contribution(source, at, row, position, expert) - contribution(
                base, at, row, position, expert
            )
            add(f"M{layer}E{expert}", change, gradient)
        shared = at + "mlp.hook_shared_out"
        if shared in base:
            add(f"M{layer}S", source[shared][row, position] - base[shared][row, position], gradient)
    return out


def patch_of(sender: str) -> tuple[str, dict[str, int]]:
    """The activation and the cell that a sender's name stands for."""
    if sender.startswith("A"):
        layer, head = sender[1:].split("H")
        return "attn.hook_z", {"layer": int(layer), "head": int(head)}
    if sender.endswith("S"):
        return "mlp.hook_shared_out", {"layer": int(sender[1:-1])}
    layer, expert = sender[1:].split("E")
    return "mlp.hook_expert_contrib", {"layer": int(layer), "expert": int(expert)}


def partly_patched_logits(
    hf_model: Any, corrupted: Tensor, mask: Tensor, clean: Cache, sender: str, share: float
) -> Tensor:
    """Logits with a sender moved by a share of the way from what it writes in the corrupted run to the clean one,
    while every token keeps the experts that it has in the corrupted run."""
    activation, cell = patch_of(sender)
    at = f"blocks.{cell['layer']}."
    edits: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, choice in reference_cache(hf_model, corrupted, mask).items():
        if kind_of(name) == "mlp.hook_expert_indices":
            edits[name] = lambda value, choice=choice: choice
    if "expert" in cell:
        moved = at + "hook_mlp_out"
        edits |= expert_edits(mask, clean, [at + "mlp.hook_expert_contrib"], cell)
        whole = edits[moved]
    else:
        moved = at + activation

        def whole(value: Tensor) -> Tensor:
            return replaced(value, clean[moved], mask, axes_of(activation), cell)

    edits[moved] = lambda value: value + share * (whole(value.clone()) - value)
    return reference_logits(hf_model, corrupted, mask, edits)
