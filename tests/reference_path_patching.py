"""Path patching, slow and obvious: one full run of the transformers model for each sender, by edits of hook points.

The clean and the corrupted run are made once. Then the clean prompts are run with the sender's output replaced and
with whatever the rule freezes put back to its clean value, everywhere. Nothing of moe_lens is imported here.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.reference import Cache, reference_cache, reference_run


class Patched(NamedTuple):
    """Logits `[b p vocabulary]`, and router logits `[b p expert]` by MoE layer."""

    logits: Tensor
    router_logits: dict[int, Tensor]


def path_patched(
    hf_model: Any,
    tokens: Tensor,
    corrupted: Tensor,
    mask: Tensor,
    sender: str,
    freeze: str,
    positions: Tensor,
) -> Patched:
    """The clean run with a sender's output replaced at `positions` `[b p]`, and the rest frozen by the rule."""
    clean, other = (reference_cache(hf_model, t, mask) for t in (tokens, corrupted))
    edits = frozen(clean, freeze)
    name, written = replacement(clean, other, sender)
    chosen = torch.where(positions[:, :, None].bool(), written, clean[name])
    edits[name] = lambda value: chosen
    with torch.no_grad():
        logits, values = reference_run(hf_model, tokens, mask, edits)
    return Patched(logits, router_logits_of(values))


def clean_outputs(hf_model: Any, tokens: Tensor, mask: Tensor) -> Patched:
    with torch.no_grad():
        logits, values = reference_run(hf_model, tokens, mask)
    return Patched(logits, router_logits_of(values))


def router_logits_of(values: Cache) -> dict[int, Tensor]:
    return {int(name.split(".")[1]): v for name, v in values.items() if name.endswith("hook_router_logits")}


def frozen(clean: Cache, freeze: str) -> dict[str, Any]:
    """What the rule puts back: each attention layer's output; and the choice and weights, or each MLP's output."""
    points = {
        "attention": ["hook_attn_out"],
        "routing": ["hook_attn_out", "mlp.hook_expert_indices", "mlp.hook_routing_weights"],
        "all": ["hook_attn_out", "hook_mlp_out"],
    }[freeze]
    edits: dict[str, Any] = {}
    for name, value in clean.items():
        if name.startswith("blocks.") and name.split(".", 2)[2] in points:
            edits[name] = lambda _, value=value: value
    return edits


def replacement(clean: Cache, other: Cache, sender: str) -> tuple[str, Tensor]:
    """The hook point of the component that the sender belongs to, and that component's output `[b p d]` when the
    sender writes what it did in the other run."""
    if sender == "embed":
        return "hook_embed", other["hook_embed"]
    if match := re.fullmatch(r"A(\d+)", sender):
        name = f"blocks.{match[1]}.hook_attn_out"
        return name, other[name]
    if match := re.fullmatch(r"M(\d+)", sender):
        name = f"blocks.{match[1]}.hook_mlp_out"
        return name, other[name]
    if match := re.fullmatch(r"A(\d+)H(\d+)", sender):
        name, head = f"blocks.{match[1]}.hook_attn_out", int(match[2])
        result = f"blocks.{match[1]}.attn.hook_result"
        return name, clean[name] - clean[result][:, :, head] + other[result][:, :, head]
    if match := re.fullmatch(r"M(\d+)S", sender):
        name, shared = f"blocks.{match[1]}.hook_mlp_out", f"blocks.{match[1]}.mlp.hook_shared_out"
        return name, clean[name] - clean[shared] + other[shared]
    match = re.fullmatch(r"M(\d+)E(\d+)", sender)
    assert match, sender
    name = f"blocks.{match[1]}.hook_mlp_out"
    theirs, ours = (expert_output(values, int(match[1]), int(match[2])) for values in (other, clean))
    return name, clean[name] - ours + theirs


def expert_output(values: Cache, layer: int, expert: int) -> Tensor:
    """What one expert adds, `[b p d]`: zero where it was not chosen."""
    indices = values[f"blocks.{layer}.mlp.hook_expert_indices"]
    contributions = values[f"blocks.{layer}.mlp.hook_expert_contrib"]
    out = torch.zeros_like(contributions[:, :, 0])
    batch, length, slots = indices.shape
    for row in range(batch):
        for position in range(length):
            for slot in range(slots):
                if indices[row, position, slot] == expert:
                    out[row, position] = contributions[row, position, slot]
    return out
