"""One forward pass under specs, and what is measured of it, in a trace.

A layer's experts are given, as `(x, indices, weights)`, what the specs make of the choice and its weights: a removed
slot has weight 0. What stands in for removed outputs, g_i times a vector, is added to the experts' sum; what stands in
for the shared experts' is put in their place in the layer's output. So nothing of the model is computed again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lens.interop.nnsight.shipped.choice import (
    fired_in_choice,
    is_absent,
    places_of,
    rechosen,
    removed_slots,
    swapped,
)


def run_ablated(
    lm: Any,
    facts: dict[str, Any],
    tokens: Tensor,
    real: Tensor,
    measure: dict[str, Any],
    vectors: dict[int, Tensor],
    layers: list[dict[str, Any]],
) -> dict[str, Any]:
    """One pass.

    Args:
        lm: the model's envoy.
        facts: of the model.
        tokens: `[batch, pos]`.
        real: which of them are no padding, `[batch, pos]`.
        measure: see `measured`.
        vectors: what stands in for experts' outputs at a layer, `[row, d_model]`.
        layers: those that are changed, in their order, each with its number and its `specs`. None is the clean run.

    Returns:
        `values`, as measured, and `counts`: (spec, layer, asked, fired), integers. Or, where a layer cannot be changed
        as asked, what its router did: `layer`, `probabilities`, `indices`, `weights`, `[batch, pos, ...]`, heaviest
        slot first.
    """
    counts, flat = [], real.flatten()
    for layer in layers:
        mlp, number = lm.model.layers[layer["layer"]].mlp, layer["layer"]
        chooses = any(spec["chooses"] for spec in layer["specs"])
        logits = mlp.gate.output[0].detach() if chooses else None
        x, indices, weights = mlp.experts.inputs[0]
        changed = change_layer(
            logits, indices, weights.detach(), layer["specs"], flat.to(x.device), facts, vectors.get(number)
        )
        if "refused" in changed:
            shown = {
                name: value.reshape(*tokens.shape, -1).cpu() for name, value in changed["refused"].items()
            }
            return {"layer": number, **shown}
        mlp.experts.inputs = ((x, changed["indices"], changed["weights"]), {})
        routed = None
        if changed["added"] is not None:
            routed = sum_of(mlp.experts.output, changed["added"])
            mlp.experts.output = routed
        if changed["shared_at"] is not None:
            routed = mlp.experts.output if routed is None else routed
            alone, out = sum_of(routed, changed["shared"]), mlp.output
            mlp.output = torch.where(changed["shared_at"][:, None], alone, out.reshape(alone.shape)).reshape(
                out.shape
            )
        counts += [[spec, number, *pair] for spec, pair in changed["counts"].items()]
    logits = lm.lm_head.output.detach()
    return {"values": measured(logits, tokens, real, measure), "counts": counts}


def sum_of(routed: Tensor, other: Tensor) -> Tensor:
    """Two sums of outputs, added in float32, in the dtype of the first."""
    return (routed.float() + other).to(routed.dtype)


# ---- a layer ----


def change_layer(
    logits: Tensor | None,
    given: Tensor,
    given_weights: Tensor,
    specs: list[dict[str, Any]],
    real: Tensor,
    facts: dict[str, Any],
    vectors: Tensor | None,
) -> dict[str, Any]:
    """What a layer's experts are given under its specs.

    Args:
        logits: the router's, `[token, expert]`, where a spec changes the choice.
        given, given_weights: the choice as transformers makes it, `[token, k]`, in any order.
        real: `[token]`.

    Returns:
        indices, weights: `[token, new_k]`; weights in the dtype in which they came.
        added: to the experts' sum, `[token, d_model]`, float32; None where nothing is.
        shared, shared_at: what stands in for the shared experts' output, `[token, d_model]` or `[token, 1]`, and where;
            None where it stays.
        counts: (asked, fired) by the number of the spec.
        Or `refused`, where it cannot be done.
    """
    with torch.no_grad(), torch.autocast(given.device.type, enabled=False):
        order = given_weights.argsort(dim=-1, descending=True, stable=True)
        arriving, weights = given.gather(-1, order), given_weights.gather(-1, order)
        refused = {"indices": arriving, "weights": weights}
        indices, kept = arriving, torch.ones_like(arriving, dtype=torch.bool)
        touched, made, counts = torch.zeros_like(real), None, {}
        choosing = [spec for spec in specs if spec["chooses"]]
        if choosing and logits is not None:
            probabilities = logits.float().softmax(dim=-1)
            refused["probabilities"] = probabilities
            change = swapped if choosing[0]["kind"] == "swap" else rechosen
            made = change(probabilities, arriving, choosing, real, facts)
            if made is None:
                return {"refused": refused}
            indices, kept, touched = made["indices"], made["kept"], made["touched"]
            weights = made["weights"].to(weights.dtype)
        ablated = removals(indices, weights, kept, [spec for spec in specs if not spec["chooses"]], real)
        if ablated is None:
            return {"refused": refused}
        weights, touched = ablated["weights"], touched | ablated["touched"]
        stand_ins = replacements(indices, weights, ablated["removed"], specs, real, facts, vectors)
        if stand_ins is None:
            return {"refused": refused}
        weights = weights.masked_fill(ablated["gone"], 0.0)
        if made is not None:
            for spec in choosing:
                fired = fired_in_choice(spec, made, arriving, indices, kept)
                counts[spec["number"]] = (int(made["asked"][spec["number"]].sum()), fired)
        for spec in specs:
            if spec["number"] in ablated["removed"]:
                removed = ablated["removed"][spec["number"]]
                asked, fired = int(removed.sum()), int((removed & (weights == 0)).sum())
                if spec["shared"]:
                    places = places_of(spec, real)
                    asked += int(places.sum())
                    fired += int((places & stand_ins["shared_at"]).sum())
                counts[spec["number"]] = (asked, fired)
        if indices.shape == given.shape:
            # What is not touched stays as it came, to the bit and in its order.
            indices = torch.where(touched[:, None], indices, given)
            weights = torch.where(touched[:, None], weights, given_weights)
    return {"indices": indices, "weights": weights, "counts": counts, **stand_ins}


def removals(
    indices: Tensor, weights: Tensor, kept: Tensor, specs: list[dict[str, Any]], real: Tensor
) -> dict[str, Any] | None:
    """Which slots ablations remove, and the weights that `renormalize` gives to those that stay.

    Returns:
        removed: by the number of the spec, `[token, k]`.
        gone: the slots that lose their weight.
        touched: the tokens with a removed slot.
        weights: in the dtype in which they came.
        None where a named expert is not active where it has to be, two specs remove one slot, or none stays.
    """
    removed, gone, rescaled = {}, torch.zeros_like(kept), torch.zeros_like(kept)
    for spec in specs:
        places = places_of(spec, real)
        here = removed_slots(spec, places, indices, kept)
        if is_absent(spec, places, indices, kept) or bool((gone & here).any()):
            return None
        removed[spec["number"]], gone = here, gone | here
        if spec["how"] == "renormalize":
            rescaled = rescaled | here
    some = rescaled.any(dim=-1)
    if bool((some & ~(kept & ~rescaled).any(dim=-1)).any()):
        return None
    full = weights.float()
    left = full * ~rescaled
    scaled = (left * (full.sum(dim=-1, keepdim=True) / left.sum(dim=-1, keepdim=True))).to(weights.dtype)
    weights = torch.where(some[:, None], scaled, weights)
    return {"removed": removed, "gone": gone, "touched": gone.any(dim=-1), "weights": weights}


def replacements(
    indices: Tensor,
    weights: Tensor,
    removed: dict[int, Tensor],
    specs: list[dict[str, Any]],
    real: Tensor,
    facts: dict[str, Any],
    vectors: Tensor | None,
) -> dict[str, Any] | None:
    """What stands in for removed outputs; None where there is no vector for one of them."""
    # The shared experts' are zeros, but where there is a vector.
    added, shared, shared_at = None, torch.zeros(len(real), 1, device=real.device), None
    for spec in specs:
        if spec["number"] not in removed:
            continue
        places = places_of(spec, real)
        if spec["shared"]:
            shared_at = places if shared_at is None else shared_at | places
        if spec["rows"] is None or vectors is None:
            continue
        stock, rows = vectors.to(real.device), rows_of(spec, places, facts["n_experts"])
        token, slot = removed[spec["number"]].nonzero(as_tuple=True)
        found = rows[token, indices[token, slot]]
        if bool((found < 0).any()):
            return None
        if added is None:
            added = torch.zeros(len(real), stock.shape[1], device=real.device)
        added = added.index_add(0, token, weights[token, slot].float()[:, None] * stock[found].float())
        if spec["shared"]:
            shared = torch.where(places[:, None], stock[rows[:, -1].clamp(min=0)].float(), shared)
    return {"added": added, "shared": shared, "shared_at": shared_at}


def rows_of(spec: dict[str, Any], places: Tensor, n_experts: int) -> Tensor:
    """The row of each expert's vector at each token, `[token, expert]`; -1 where there is none. The shared experts'
    come last."""
    rows = torch.full((len(places), n_experts + 1), -1, dtype=torch.long, device=places.device)
    # As many rows as there are places, or one for all of them.
    here = spec["rows"].to(places.device).long().expand(int(places.sum()), -1)
    columns = torch.tensor(spec["columns"], device=places.device) % (n_experts + 1)
    rows[places.nonzero(), columns] = here
    return rows


# ---- what is measured ----


def measured(logits: Tensor, tokens: Tensor, real: Tensor, measure: dict[str, Any]) -> Tensor:
    """What is read of a run's logits, in float32.

    Args:
        logits: `[batch, pos, d_vocab]`.
        measure: `kind` is `loss`, `[batch, pos - 1]` in nats, NaN where a token or its next is padding; or, at a column
            of each row (`columns`), `logits` `[batch, d_vocab]` or the `difference` between those of two `tokens`,
            `[batch]`.
    """
    tokens, real = tokens.to(logits.device), real.to(logits.device)
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        if measure["kind"] == "loss":
            rows = [
                F.cross_entropy(row[:-1].float(), following[1:], reduction="none")
                for row, following in zip(logits, tokens, strict=True)
            ]
            return torch.stack(rows).masked_fill(~(real[:, :-1] & real[:, 1:]), torch.nan)
        columns = torch.tensor(measure["columns"], device=logits.device)
        there = logits[torch.arange(len(columns), device=logits.device), columns].float()
        if measure["kind"] == "logits":
            return there
        correct, incorrect = measure["tokens"]
        return there[:, correct] - there[:, incorrect]
