"""Which experts a layer chooses under specs that change its choice, in a trace.

The rules are those of `moe_lens.interventions.layer_choice`, on flat tokens: probabilities `[token, expert]`, a choice
`[token, k]`, heaviest first. A spec is a dict of plain data (`moe_lens.interop.nnsight.ablation`). What cannot be done
gives None here; the caller, which has the words for it, says what.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor


def places_of(spec: dict[str, Any], real: Tensor) -> Tensor:
    """Where a spec acts, `[token]`: its places, or every real token."""
    if spec["places"] is None:
        return real
    places = torch.zeros_like(real)
    places[spec["places"]] = True
    return places


def named_of(spec: dict[str, Any], n_experts: int, like: Tensor) -> Tensor:
    """The experts that a spec names, `[expert]`."""
    named = torch.zeros(n_experts, dtype=torch.bool, device=like.device)
    named[spec["experts"]] = True
    return named


# ---- active experts ----


def removed_slots(spec: dict[str, Any], places: Tensor, indices: Tensor, kept: Tensor) -> Tensor:
    """The slots of a choice that a spec removes, `[token, k]`; `kept` are those that hold an active expert."""
    here = places[:, None] & kept
    if spec["ranks"]:
        slots = torch.arange(1, indices.shape[-1] + 1, device=indices.device)
        return here & torch.isin(slots, torch.tensor(spec["ranks"], device=indices.device))
    named = torch.isin(indices, torch.tensor(spec["experts"], device=indices.device, dtype=indices.dtype))
    return here & (~named if spec["all_but"] else named)


def is_absent(spec: dict[str, Any], places: Tensor, indices: Tensor, kept: Tensor) -> bool:
    """Whether a named expert is not active where it has to be: everywhere, or somewhere."""
    for expert in spec["experts"] if spec["active"] else []:
        active = ((indices == expert) & kept).any(dim=-1)
        missed = places & ~active
        if bool(missed.any()) if spec["active"] == "everywhere" else bool((missed == places).all()):
            return True
    return False


# ---- the router's arithmetic ----


def eligible(probabilities: Tensor, facts: dict[str, Any]) -> Tensor:
    """Probabilities, -inf for experts outside the best groups."""
    if facts["n_groups"] == 1:
        return probabilities
    grouped = rearrange(probabilities, "n (group member) -> n group member", group=facts["n_groups"])
    best = grouped.amax(dim=-1).topk(facts["top_k_groups"], dim=-1).indices
    allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
    return rearrange(
        grouped.masked_fill(~allowed[..., None], -torch.inf), "n group member -> n (group member)"
    )


def weights_of(probabilities: Tensor, indices: Tensor, kept: Tensor, facts: dict[str, Any]) -> Tensor:
    """The family's weights, in float32, when only the kept slots were chosen: the others get 0."""
    weights = probabilities.gather(-1, indices) * kept
    if facts["renormalize"]:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * facts["scaling_factor"]


def choose(
    probabilities: Tensor, k: int, excluded: Tensor, forced: Tensor, facts: dict[str, Any]
) -> Tensor | None:
    """The k experts that each token takes; None where fewer remain to be chosen from."""
    # Forced ones come first, whatever their group.
    ranked = eligible(probabilities.masked_fill(excluded, -torch.inf), facts).masked_fill(forced, 2.0)
    scores, indices = ranked.topk(k, dim=-1)
    return None if bool((scores == -torch.inf).any()) else indices


# ---- the choice ----


def rechosen(
    probabilities: Tensor, arriving: Tensor, specs: list[dict[str, Any]], real: Tensor, facts: dict[str, Any]
) -> dict[str, Any] | None:
    """The choice under forced and forbidden experts, `reroute` and another top-k, all together.

    Returns:
        indices, kept, weights: `[token, k]`, the weights in float32.
        touched: the tokens whose choice was made again.
        asked: by the number of the spec, the `(token, expert)` or tokens that it was to change.
        None where it cannot be done, or a named expert is not active where it has to be.
    """
    nowhere = torch.zeros_like(probabilities, dtype=torch.bool)
    sizes = torch.full_like(arriving[:, 0], arriving.shape[-1])
    touched = torch.zeros_like(real)
    for spec in specs:
        if spec["kind"] == "top_k":
            # Everywhere is padding too: a choice has one width.
            at = torch.ones_like(real) if spec["places"] is None else places_of(spec, real)
            sizes, touched = sizes.masked_fill(at, spec["k"]), touched | at
    before = selected(probabilities, arriving, touched, sizes, nowhere, nowhere, facts)
    if before is None:
        return None
    excluded, forced, asked = nowhere, nowhere, {}
    for spec in specs:
        places = places_of(spec, real)
        if spec["kind"] == "top_k":
            asked[spec["number"]] = places
            continue
        here = places[:, None] & named_of(spec, probabilities.shape[-1], probabilities)
        if spec["kind"] == "force":
            forced, asked[spec["number"]] = forced | here, here
            touched = touched | (here & ~before["taken"]).any(dim=-1)
            continue
        if is_absent(spec, places, before["indices"], before["kept"]):
            return None
        removed = removed_slots(spec, places, before["indices"], before["kept"])
        asked[spec["number"]] = nowhere.scatter(-1, before["indices"], removed)
        # Of several that are named none may take the slot of another, so the inactive go as well.
        excluded = excluded | (here if spec["by_name"] else asked[spec["number"]])
        touched = touched | removed.any(dim=-1)
    if bool((forced & excluded).any()):
        return None
    after = selected(probabilities, arriving, touched, sizes, excluded, forced, facts)
    if after is None:
        return None
    weights = weights_of(probabilities, after["indices"], after["kept"], facts)
    return {**after, "weights": weights, "touched": touched, "asked": asked}


def selected(
    probabilities: Tensor,
    arriving: Tensor,
    touched: Tensor,
    sizes: Tensor,
    excluded: Tensor,
    forced: Tensor,
    facts: dict[str, Any],
) -> dict[str, Tensor] | None:
    """Which experts are taken, `[token, expert]`; their slots, heaviest first, and which of these are kept.

    Where nothing is touched they are as they came; None where too few remain.
    """
    taken = torch.zeros_like(excluded).scatter(-1, arriving, True)
    for size in sizes[touched].unique().tolist():
        here = (touched & (sizes == size))[:, None]
        new = choose(probabilities, size, excluded & here, forced & here, facts)
        if new is None:
            return None
        taken = torch.where(here, torch.zeros_like(taken).scatter(-1, new, True), taken)
    width = int(taken.sum(dim=-1).max())
    # Probabilities lie in [0, 1], so what is not taken comes after all that is.
    indices = torch.where(taken, probabilities, probabilities - 2).topk(width, dim=-1).indices
    if width == arriving.shape[-1]:
        indices = torch.where(touched[:, None], indices, arriving)
    return {"taken": taken, "indices": indices, "kept": taken.gather(-1, indices)}


def swapped(
    probabilities: Tensor, arriving: Tensor, specs: list[dict[str, Any]], real: Tensor, facts: dict[str, Any]
) -> dict[str, Any]:
    """The choice when slots give their place to other ranks; as `rechosen` gives it."""
    k, every = arriving.shape[-1], torch.ones_like(arriving, dtype=torch.bool)
    order = probabilities.argsort(dim=-1, descending=True, stable=True)
    # Those chosen, then the others of the best groups, then the rest: each by probability.
    may_be_chosen = eligible(probabilities, facts) > -torch.inf
    standing = may_be_chosen.long().scatter(-1, arriving, 2).gather(-1, order)
    ranked = order.gather(-1, standing.argsort(dim=-1, descending=True, stable=True))
    indices, touched, by_slot, asked = arriving, torch.zeros_like(real), torch.zeros_like(real), {}
    for spec in specs:
        i, j, places = spec["i"] - 1, spec["j"] - 1, places_of(spec, real)
        new = arriving.clone()
        new[:, i] = ranked[:, j] if j >= k else arriving[:, j]
        if j < k:
            new[:, j] = arriving[:, i]
        if spec["weights"] == "own":
            heaviest_first = probabilities.gather(-1, new).argsort(dim=-1, descending=True, stable=True)
            new = new.gather(-1, heaviest_first)
        else:
            by_slot = by_slot | places
        indices = torch.where(places[:, None], new, indices)
        touched, asked[spec["number"]] = touched | places, places
    weights = torch.where(
        by_slot[:, None],
        weights_of(probabilities, arriving, every, facts),
        weights_of(probabilities, indices, every, facts),
    )
    return {
        "indices": indices,
        "kept": every,
        "weights": weights,
        "touched": touched,
        "asked": asked,
        "ranked": ranked,
    }


def fired_in_choice(
    spec: dict[str, Any], made: dict[str, Any], arriving: Tensor, indices: Tensor, kept: Tensor
) -> int:
    """How much of what a spec was to change of the choice is changed in the one that is used, `indices`, `kept`."""
    asked = made["asked"][spec["number"]]
    if spec["kind"] == "top_k":
        return int((asked & (kept.sum(dim=-1) == spec["k"])).sum())
    if spec["kind"] == "swap":
        i, j, k = spec["i"] - 1, spec["j"] - 1, arriving.shape[-1]
        leaves, comes = arriving[:, i], made["ranked"][:, j] if j >= k else arriving[:, j]
        has_come = (indices == comes[:, None]).any(dim=-1)
        has_left = (indices != leaves[:, None]).all(dim=-1) if j >= k else indices[:, i] == comes
        return int((asked & has_come & has_left).sum())
    taken = torch.zeros_like(asked).scatter(-1, indices, kept)
    return int((asked & (taken if spec["kind"] == "force" else ~taken)).sum())
