"""What specs cannot ask for together at one layer; found before anything runs.

The same rules are asked twice: with `certain_places`, before any batch is known, and with a batch's own places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moe_lens.config import RouterConfig
from moe_lens.interventions.arguments import ExpertName
from moe_lens.interventions.expert_reference import SHARED
from moe_lens.interventions.spec import (
    Ablate,
    ForbidExperts,
    ForceExperts,
    NamedExperts,
    Spec,
    SwapRanks,
    TopK,
)

Numbered = tuple[int, Spec]
"""A spec with its index among all that are applied, which the receipt's lines go by."""

Places = Mapping[int, Bool[Tensor, "batch pos"]]
"""Where each spec acts, by its index."""


def chooses(spec: Spec) -> bool:
    """Whether it changes which experts are chosen."""
    return not isinstance(spec, Ablate) or spec.how == "reroute"


def check_together(
    router: RouterConfig, layer: int, specs: Sequence[Numbered], places: Places, *, all_known: bool
) -> None:
    """Raise for what a layer's specs cannot do together.

    Args:
        specs: those of the layer, without `RouterOnly`.
        places: where they act; those that any two have in common count.
        all_known: whether these are all places that they have in common, or only those that they surely have.

    Raises:
        ValueError: with the specs, or the expert, named.
    """
    _check_choosers(layer, [spec for _, spec in specs if chooses(spec)])
    for (i, first), (j, second) in combinations(specs, 2):
        if bool((places[i] & places[j]).any()):
            _check_pair(layer, first, second)
    sizes = _sizes(router, specs, places)
    if all_known or not any(isinstance(spec, TopK) and spec.pos is not None for _, spec in specs):
        for i, spec in specs:
            if isinstance(spec, Ablate):
                _check_ablation(layer, spec, sizes[places[i]])
        _check_room(router, layer, specs, places, sizes)


def _check_choosers(layer: int, choosing: Sequence[Spec]) -> None:
    swaps = [spec for spec in choosing if isinstance(spec, SwapRanks)]
    sizes = [spec for spec in choosing if isinstance(spec, TopK)]
    if swaps and len(choosing) > len(swaps):
        other = next(spec for spec in choosing if not isinstance(spec, SwapRanks))
        raise ValueError(f"layer {layer}: {swaps[0]} and {other} both change the choice of experts")
    if len(sizes) > 1:
        raise ValueError(f"layer {layer}: {sizes[0]} and {sizes[1]} contradict each other; one TopK a layer")


def _check_pair(layer: int, first: Spec, second: Spec) -> None:
    """Two specs that have a place in common."""
    if isinstance(first, SwapRanks) and isinstance(second, SwapRanks):
        raise ValueError(f"layer {layer}: {first} and {second} act at the same position")
    for one, other in ((first, second), (second, first)):
        if isinstance(one, ForceExperts):
            excluded = set(one.routed_at(layer)) & _excluded(other, layer)
            if excluded:
                raise ValueError(
                    f"{ExpertName(layer, min(excluded))} is forced and excluded: {one} and {other}"
                )
    if (
        isinstance(first, Ablate)
        and isinstance(second, Ablate)
        and not chooses(first)
        and not chooses(second)
    ):
        twice = _named(first, layer) & _named(second, layer)
        if twice:
            raise ValueError(f"{ExpertName(layer, min(twice))} is ablated by two specs: {first} and {second}")
        ranks = set(first.ranks) & set(second.ranks)
        if ranks:
            raise ValueError(
                f"layer {layer}: rank {min(ranks)} is ablated by two specs: {first} and {second}"
            )


def _named(spec: Ablate, layer: int) -> set[int]:
    if spec.all_but:
        return set()
    return {*spec.routed_at(layer), *([SHARED] if spec.shared_at(layer) else [])}


def _excluded(spec: Spec, layer: int) -> set[int]:
    """The experts that it keeps from being chosen, as far as it names them."""
    is_reroute = isinstance(spec, Ablate) and spec.how == "reroute" and not spec.all_but
    if isinstance(spec, ForbidExperts) or is_reroute:
        assert isinstance(spec, NamedExperts)
        return set(spec.routed_at(layer))
    return set()


def _sizes(router: RouterConfig, specs: Sequence[Numbered], places: Places) -> Int[Tensor, "batch pos"]:
    """How many experts are chosen at each place."""
    sizes = torch.full_like(next(iter(places.values())), router.top_k, dtype=torch.long)
    for i, spec in specs:
        if isinstance(spec, TopK):
            sizes = sizes.masked_fill(places[i], spec.k)
    return sizes


def _check_ablation(layer: int, spec: Ablate, sizes: Int[Tensor, " place"]) -> None:
    k = int(sizes.min())
    beyond = [rank for rank in spec.ranks if not 1 <= rank <= k]
    if beyond:
        raise ValueError(
            f"layer {layer}: there is no active expert of rank {beyond[0]}: ranks go from 1, the heaviest, to {k}"
        )
    n_named = len(spec.routed_at(layer))
    if spec.must_be_active and n_named > k:
        raise ValueError(f"layer {layer}: {n_named} experts are to be removed, and only {k} are active")
    n_removed = len(spec.ranks) or (n_named if spec.must_be_active else 0)
    if spec.how == "renormalize" and n_removed >= k:
        raise ValueError(
            f"layer {layer}: renormalize needs an expert that stays, and all {k} active ones would be removed"
        )


def _check_room(
    router: RouterConfig,
    layer: int,
    specs: Sequence[Numbered],
    places: Places,
    sizes: Int[Tensor, "batch pos"],
) -> None:
    """Whether forced experts have slots, and slots have experts left to be chosen."""
    absent = torch.zeros(*sizes.shape, router.n_experts, dtype=torch.bool, device=sizes.device)
    forced, excluded, n_unnamed = absent.clone(), absent.clone(), torch.zeros_like(sizes)
    for i, spec in specs:
        if isinstance(spec, ForceExperts):
            forced |= _at(places[i], spec.routed_at(layer), absent)
        elif _excluded(spec, layer):
            excluded |= _at(places[i], tuple(_excluded(spec, layer)), absent)
        elif isinstance(spec, Ablate) and spec.how == "reroute":
            # Slots of the choice: they are as many experts, whichever they are.
            n_slots = len(spec.ranks) if spec.ranks else sizes - len(spec.routed_at(layer))
            n_unnamed = torch.where(
                places[i], torch.as_tensor(n_slots, device=sizes.device).clamp(min=0), n_unnamed
            )
    crowded = (forced.sum(dim=-1) > sizes).nonzero()
    if len(crowded):
        row, column = crowded[0].tolist()
        raise ValueError(
            f"layer {layer}: {int(forced[row, column].sum())} experts are forced into {int(sizes[row, column])} slots"
        )
    # At most so many: those of the groups that have the most members left.
    members = (~excluded).unflatten(-1, (router.n_groups, -1)).sum(dim=-1)
    eligible = members.sort(dim=-1, descending=True).values[..., : router.top_k_groups].sum(dim=-1)
    eligible = torch.minimum(eligible, router.n_experts - n_unnamed)
    # Forced ones need not be of these groups.
    left = eligible + forced.sum(dim=-1) * (router.n_groups > 1)
    empty = (left < sizes).nonzero()
    if len(empty):
        row, column = empty[0].tolist()
        raise ValueError(
            f"layer {layer}: {int(left[row, column])} experts remain to be chosen from, and "
            f"{int(sizes[row, column])} are wanted"
        )


def _at(
    places: Bool[Tensor, "batch pos"], experts: tuple[int, ...], like: Bool[Tensor, "batch pos expert"]
) -> Bool[Tensor, "batch pos expert"]:
    named = torch.zeros_like(like[0, 0])
    named[list(experts)] = True
    return places[..., None] & named
